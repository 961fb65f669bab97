// A panel of the dashboard: what its queries gave at each sample, as lines, numbers or a distribution (drawn by uPlot).

import { colour } from "./charts.js";
import { element } from "./elements.js";
import { parse } from "./promql.js";
import { named, writer } from "./units.js";

const HEIGHT = 170;
const DRAWN = 8; // lines of a panel, at most: the largest
const KEPT = 64; // series of a panel, at most
const RATE_S = 60; // over which a rate is taken
const LEAST_S = 60; // that a chart shows, at least
const DASHES = [[], [6, 3], [2, 3]]; // lines differ by more than their colour
const COLOURS = Array.from({ length: DRAWN }, (_, i) => `--series-${i + 1}`);
const BINARY = Array.from({ length: 50 }, (_, i) => 2 ** i); // what ticks of bytes are multiples of
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const exact = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const pale = (css) => css.replace("rgb(", "rgba(").replace(")", ", 0.18)");
const last = (values) => values.at(-1);

export class Panel {
  #queries;
  #series = new Map(); // values by name, one a sample
  #now = []; // what the queries give at the last sample, over the chosen time: {name, labels, value}
  #chart = null;
  #drawn = ""; // what the chart was made for
  #times = [];
  #body = element("div", { className: "chart" });
  #values = element("ul", { className: "values" });
  #moment = element("p", { className: "moment help" });

  /** description: {title, description, unit, kind, queries by legend}. */
  constructor({ title, description, unit, kind, queries }, number) {
    Object.assign(this, { kind, write: writer(unit), ticks: unit.startsWith("B") || unit === "bytes" ? { incrs: BINARY } : {} });
    this.#queries = Object.entries(queries).map(([legend, query]) => ({ legend, evaluate: parse(query) }));
    const id = `panel-${number}`;
    const about = element("p", { className: "help" }, description);
    this.place = element(
      "figure",
      { className: `panel ${kind}` },
      element("h4", { id }, title),
      ...(kind === "number" ? [this.#body, about] : [about, this.#body, this.#values, this.#moment]),
    );
    this.place.setAttribute("aria-labelledby", id);
    this.#body.addEventListener("keydown", (event) => this.#walk(event));
    this.#body.addEventListener("blur", () => this.#point(null));
  }

  /** Takes in a new sample. seconds: the time that is shown. */
  sample(samples, seconds) {
    const whole = this.kind === "distribution";
    const found = this.#queries.flatMap(({ legend, evaluate }) =>
      evaluate(samples, whole ? seconds : RATE_S).map(({ labels, value }) => ({ name: named(legend, labels), labels, value })),
    );
    this.#now = found.slice(0, KEPT);
    if (whole || this.kind === "number") return;
    const length = samples.times.length;
    for (const [name, values] of this.#series) {
      values.push(null);
      if (values.length > length) values.shift();
      if (values.every((value) => value === null)) this.#series.delete(name);
    }
    for (const { name, value } of found) {
      if (!this.#series.has(name) && this.#series.size < KEPT) this.#series.set(name, Array(length).fill(null));
      if (!Number.isNaN(value)) this.#series.get(name)?.splice(-1, 1, value);
    }
  }

  /** Shows what is known. */
  draw(samples, seconds) {
    if (this.kind === "number") return this.#drawNumbers();
    if (this.kind === "distribution") return this.#drawDistribution();
    const first = samples.first(seconds);
    this.#times = samples.times.slice(first);
    const lines = [...this.#series].map(([name, values]) => ({ name, values: values.slice(first) }));
    const all = lines.filter(({ values }) => values.some((value) => value !== null));
    const known = all.length > DRAWN ? all.filter(({ values }) => values.some(Boolean)) : all;
    const size = ({ values }) => Math.max(...values.map((value) => Math.abs(value ?? 0)));
    const chosen = known.sort((a, b) => size(b) - size(a)).slice(0, DRAWN);
    const order = [...this.#series.keys()];
    chosen.sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
    this.#drawLines(chosen, known.length - chosen.length);
  }

  #drawNumbers() {
    const shown = this.#now.length ? this.#now : [{ name: "", value: null }];
    this.#body.replaceChildren(
      ...shown.map(({ name, value }) =>
        element("p", {}, element("b", {}, this.write(value)), " ", element("span", {}, name)),
      ),
    );
  }

  #drawLines(lines, more) {
    const stacked = this.kind === "stack";
    const values = lines.map((line) => line.values);
    const data = [this.#times, ...(stacked ? sums(values) : values)];
    const make = () => this.#options(lines.map(({ name }) => name), stacked);
    this.#show(lines.length > 0, JSON.stringify(lines.map(({ name }) => name)), make, data);
    const seen = Math.max(last(this.#times) - this.#times[0], LEAST_S);
    this.#chart?.setScale("x", { min: last(this.#times) - seen, max: last(this.#times) });
    this.lines = lines;
    this.more = more;
    this.#point(this.#chart?.cursor.idx ?? null);
  }

  #drawDistribution() {
    const bounds = this.#now
      .map(({ labels, value }) => ({ end: labels.le === "+Inf" ? Infinity : Number(labels.le), value }))
      .sort((a, b) => a.end - b.end);
    const bars = bounds.map(({ end, value }, i) => ({ end, start: bounds[i - 1]?.end, count: value - (bounds[i - 1]?.value ?? 0) }));
    const total = bars.reduce((sum, { count }) => sum + count, 0);
    const data = [bars.map((_, i) => i), bars.map(({ count }) => count / total)];
    this.#show(total > 0, "bars", () => this.#barOptions(bars), data);
    const negative = bars.filter(({ end }) => end <= 0).reduce((sum, { count }) => sum + count, 0);
    const percent = writer("percentunit");
    this.#values.replaceChildren(
      ...(total > 0 ? [element("li", {}, `${percent(negative / total)} at or below 0, ${percent(1 - negative / total)} above`)] : []),
    );
  }

  /** Shows a chart of the data, made anew where it was made for something else, or says that there is none. */
  #show(any, purpose, make, data) {
    const key = `${purpose} ${this.#body.clientWidth}`;
    if (!any) {
      this.forget();
      this.#body.replaceChildren(element("p", { className: "none" }, "Nothing in this time."));
    } else if (this.#drawn === key) this.#chart.setData(data, this.kind === "distribution");
    else {
      this.forget();
      this.#body.replaceChildren();
      this.#chart = new window.uPlot(make(), data, this.#body);
      this.#drawn = key;
    }
    this.#body.tabIndex = any && this.kind !== "distribution" ? 0 : -1;
    this.place.classList.toggle("empty", !any);
  }

  /** The chart is made anew when it is next drawn. */
  forget() {
    this.#chart?.destroy();
    [this.#chart, this.#drawn] = [null, ""];
  }

  #axes() {
    const [ink, line] = ["--dim", "--line"].map(colour);
    const grid = { stroke: line, width: 1 };
    return { stroke: ink, font: "12px system-ui", grid, ticks: grid };
  }

  #base(series, axes) {
    return {
      width: this.#body.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false },
      padding: [8, 8, 0, 0],
      scales: { y: { range: (_, low, high) => window.uPlot.rangeNum(Math.min(low ?? 0, 0), high || 1, 0.1, true) } },
      axes,
      series: [{}, ...series],
    };
  }

  #options(names, stacked) {
    const axis = this.#axes();
    const lines = names.map((_, i) => {
      const stroke = colour(COLOURS[i]);
      const fill = stacked ? pale(stroke) : undefined;
      return { stroke, fill, width: 2, dash: stacked ? [] : DASHES[i % DASHES.length], points: { show: false }, spanGaps: false };
    });
    const axes = [
      { ...axis, size: 28, space: 66, values: (_, times) => times.map((time) => (times[1] - times[0] < 60 ? exact : clock).format(time * 1000)) },
      { ...axis, ...this.ticks, size: 68, values: (_, ticks) => ticks.map(this.write) },
    ];
    const options = this.#base(lines, axes);
    options.scales.x = { time: true, auto: false };
    options.hooks = { setCursor: [(chart) => this.#point(chart.cursor.idx)] };
    if (stacked) options.bands = lines.slice(1).map((_, i) => ({ series: [i + 2, i + 1] }));
    return options;
  }

  #barOptions(bars) {
    const axis = this.#axes();
    const names = bars.map(({ end, start }) => (end === Infinity ? `> ${start}` : `≤ ${end}`));
    const stroke = colour("--accent");
    const bar = { stroke, fill: pale(stroke), width: 1, paths: window.uPlot.paths.bars({ size: [0.9] }), points: { show: false } };
    const options = this.#base(
      [bar],
      [
        { ...axis, size: 28, grid: { show: false }, incrs: [1, 2, 3, 4, 6], space: 44, values: (_, at) => at.map((i) => names[i] ?? "") },
        { ...axis, size: 64, values: (_, ticks) => ticks.map(writer("percentunit")) },
      ],
    );
    options.scales.x = { time: false, range: [-0.6, bars.length - 0.4] };
    return options;
  }

  /** Lists the values at a sample, or the last ones. */
  #point(index) {
    const at = index ?? this.#times.length - 1;
    const lines = this.lines ?? [];
    this.#values.replaceChildren(
      ...lines.map(({ name, values }, i) => {
        const item = element("li", {}, element("i"), `${name} `, element("b", {}, this.write(values[at])));
        item.style.setProperty("--series", `var(${COLOURS[i]})`);
        return item;
      }),
      ...(this.more > 0 ? [element("li", {}, `and ${this.more} smaller`)] : []),
    );
    this.#moment.textContent = index === null || index === undefined ? "" : `at ${exact.format(this.#times[at] * 1000)}`;
  }

  #walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#chart?.setCursor({ left: -10, top: -10 });
    if (!step || !this.#chart) return;
    event.preventDefault();
    const index = (this.#chart.cursor.idx ?? this.#times.length - (step < 0 ? 0 : 1)) + step;
    const time = this.#times[Math.min(Math.max(index, 0), this.#times.length - 1)];
    this.#chart.setCursor({ left: this.#chart.valToPos(time, "x"), top: 0 });
  }
}

/** The sums of each line and those before it; a gap counts as 0 where any line has a value. */
function sums(lines) {
  const total = lines[0]?.map(() => null) ?? [];
  return lines.map((values) =>
    values.map((value, i) => {
      if (lines.some((line) => line[i] !== null)) total[i] = (total[i] ?? 0) + (value ?? 0);
      return total[i];
    }),
  );
}

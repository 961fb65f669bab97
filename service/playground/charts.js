// The curve of losses (drawn by uPlot) and the map of cells.

import { count, mean, nats, number } from "./tokens.js";

const HEIGHT = 200;
const SMOOTH = 32; // tokens that a point of the second view is the mean of

/** A colour of the style sheet as a canvas takes it. */
export function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

function options(width, { x, points }) {
  const [adapted, frozen, ink, line] = ["--accent", "--frozen", "--dim", "--line"].map(colour);
  const axis = {
    stroke: ink,
    font: "12px system-ui",
    grid: { stroke: line, width: 1 },
    ticks: { stroke: line, width: 1 },
  };
  const value = (_, y) => (y == null ? "" : nats(y));
  return {
    width,
    height: HEIGHT,
    cursor: { drag: { x: false, y: false } },
    legend: { markers: { width: 2, dash: (_, i) => (i === 1 ? "dashed" : "solid") } },
    scales: { x: { time: false } },
    axes: [
      {
        ...axis,
        label: x,
        labelFont: "12px system-ui",
        labelSize: 18,
        size: 32,
        incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000],
      },
      { ...axis, size: 40, values: (_, ticks) => ticks.map((tick) => number(tick, { maximumFractionDigits: 2 })) },
    ],
    series: [
      { label: x, value: (_, v) => (v == null ? "" : number(v)) },
      { label: "frozen", stroke: frozen, width: 2, dash: [5, 4], points: { show: false }, value },
      { label: "adapted", stroke: adapted, width: 2, points: { show: points, size: 6, fill: adapted }, value },
    ],
  };
}

/** A chart in `place`; `draw` is given [xs, frozen, adapted] and how to show them. */
export function makeCurve(place) {
  let chart = null;
  let last = null;
  function draw(data, look) {
    last = [data, look];
    chart?.destroy();
    chart = data[0].length ? new window.uPlot(options(place.clientWidth, look), data, place) : null;
    place.classList.toggle("empty", chart === null);
  }
  const again = () => last && draw(...last);
  new ResizeObserver(() => chart && chart.width !== place.clientWidth && again()).observe(place);
  return { draw, again };
}

/** The means of runs of tokens: where each run ends, and its frozen and adapted loss. */
export function smoothed(parts) {
  const data = [[], [], []];
  for (let end = SMOOTH; end < parts.length + SMOOTH; end += SMOOTH / 2) {
    const run = parts.slice(Math.max(0, Math.min(end, parts.length) - SMOOTH), end);
    data[0].push(Math.min(end, parts.length));
    data[1].push(-mean(run.map((part) => part.frozen)));
    data[2].push(-mean(run.map((part) => part.adapted)));
    if (end >= parts.length) break;
  }
  return data;
}

function siteMap({ name, counts, bin_cells, bin_rows, rows, cells }, before) {
  const figure = document.createElement("figure");
  const grid = Object.assign(document.createElement("div"), { className: "grid", role: "img" });
  const caption = document.createElement("figcaption");
  grid.style.setProperty("--across", Math.ceil(Math.sqrt(counts.length)));
  const used = counts.filter(Boolean).length;
  const unit = bin_cells === 1 ? "cell" : `${bin_cells} cells`;
  const told =
    `Site “${name}”: ${count(rows, "row")} in ${number(used)} of ${number(counts.length)} ${bin_cells === 1 ? "cells" : `bins of ${unit}`}` +
    `${used ? `; the fullest holds ${Math.max(...counts)} of ${bin_rows}` : ""}.`;
  grid.setAttribute("aria-label", told);
  caption.textContent = told;
  grid.append(
    ...counts.map((held, i) => {
      const cell = document.createElement("i");
      if (held) cell.style.setProperty("--fill", Math.sqrt(held / bin_rows).toFixed(3));
      if (before && held > before[i]) cell.className = "new";
      return cell;
    }),
  );
  grid.addEventListener("pointermove", ({ target }) => {
    const at = [...grid.children].indexOf(target);
    if (at >= 0) caption.textContent = `Site “${name}”, ${unit} ${at + 1}: ${count(counts[at], "row")} of ${bin_rows}.`;
  });
  grid.addEventListener("pointerleave", () => {
    caption.textContent = told;
  });
  figure.append(grid, caption);
  return figure;
}

/** The map of each site's cells in `place`; what was written since the last one is marked. */
export function makeCells(place) {
  let seen = {};
  return (sites, fresh) => {
    const before = fresh ? {} : seen;
    place.replaceChildren(...sites.map((site) => siteMap(site, before[site.name])));
    seen = Object.fromEntries(sites.map((site) => [site.name, site.counts]));
  };
}

// The dashboard: the server's metrics, read at an interval, in the panels and by the alerts of dashboard.json.

import { Alerts } from "./alerts.js";
import { element } from "./elements.js";
import { Panel } from "./panels.js";
import { Samples } from "./samples.js";
import { call, json } from "./server.js";
import { makeShell } from "./shell.js";

const INTERVAL_S = 5;
const MAX_SAMPLES = 3600 / INTERVAL_S; // an hour: as far as the alerts look back
const MAX_SERIES = 4000;

const $ = (id) => document.getElementById(id);
const range = $("range");
const seconds = () => Number(range.value);
const now = () => Date.now() / 1000;

let samples;
let alerts;
let dashboards = []; // {id, section, link, panels}
let panels = []; // of all dashboards
let timer;
let paused = false;

function build({ dashboards: described, alerts: rules }) {
  const queries = [...rules.map(({ query }) => query)];
  dashboards = described.map(({ id, title, rows }) => {
    const made = [];
    const section = element("section", { hidden: true }, element("h2", { className: "hidden" }, title));
    for (const row of rows) {
      const own = row.panels.map((panel, i) => new Panel(panel, `${id}-${made.length + i}`));
      queries.push(...row.panels.flatMap((panel) => Object.values(panel.queries)));
      made.push(...own);
      const className = own.every(({ kind }) => kind === "number") ? "panels numbers" : "panels";
      section.append(element("h3", {}, row.title), element("div", { className }, ...own.map(({ place }) => place)));
    }
    return { id, section, link: element("a", { href: `#${id}` }, title), panels: made };
  });
  panels = dashboards.flatMap((one) => one.panels);
  alerts = new Alerts(rules, $("alerts"));
  $("dashboards").append(...dashboards.map(({ link }) => link));
  $("panels").append(...dashboards.map(({ section }) => section));
  samples = new Samples({
    names: queries.flatMap((query) => query.match(/\b(?:imprint_\w+|up)\b/g)),
    shared: { job: "imprint", instance: location.host },
    maxSamples: MAX_SAMPLES,
    maxSeries: MAX_SERIES,
  });
  choose();
}

/** Shows the dashboard that the address names, or the first. */
function choose() {
  const chosen = dashboards.find(({ id }) => location.hash === `#${id}`) ?? dashboards[0];
  for (const one of dashboards) {
    one.section.hidden = one !== chosen;
    one.link.ariaCurrent = one === chosen ? "true" : null;
  }
  draw();
}

function draw() {
  if (!samples?.times.length) return;
  alerts.draw();
  for (const { section, panels } of dashboards)
    if (!section.hidden) for (const panel of panels) panel.draw(samples, seconds());
  const begun = Math.floor((samples.times.at(-1) - samples.times[0]) / 60);
  const more = samples.leftOut ? ` ${samples.leftOut} series are too many and not shown.` : "";
  $("seen").textContent = `Read every ${INTERVAL_S} s, for ${begun} min so far; at most the last hour is kept, in this page.${more}`;
}

function announce(text) {
  if ($("state").textContent !== text) $("state").textContent = text;
}

function take(exposition, answered) {
  samples.add(now(), `${exposition}\nup ${answered ? 1 : 0}`, answered);
  for (const panel of panels) panel.sample(samples, seconds());
  alerts.sample(samples);
  const [build] = samples.of("imprint_build_info").filter(({ values }) => values.at(-1) === 1);
  if (build) $("model").textContent = `${build.labels.model} · Imprint ${build.labels.version}`;
  if (!paused && !document.hidden) draw();
}

/** Reads the metrics now, and again after the interval. */
async function read() {
  clearTimeout(timer);
  try {
    if (!samples) build(await json("playground/dashboard.json"));
    take(await (await call("metrics")).text(), true);
    announce("");
    $("door").hidden = true;
    $("watch").hidden = false;
  } catch (error) {
    const shut = error.status === 401;
    $("door").hidden = !shut;
    $("watch").hidden = shut || !samples?.times.length;
    if (shut) $("model").textContent = location.host;
    announce(shut ? error.message : `${error.message} This page tries again by itself.`);
    if (shut) return;
    if (samples) take("", false);
  }
  timer = setTimeout(read, INTERVAL_S * 1000);
}

range.addEventListener("change", draw);
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").textContent = paused ? "Go on" : "Pause";
  if (!paused) draw();
});
document.addEventListener("visibilitychange", () => paused || draw());
window.addEventListener("hashchange", choose);
new ResizeObserver(draw).observe($("panels"));

const repaint = () => {
  for (const panel of panels) panel.forget();
  draw();
};
makeShell({ recoloured: repaint, entered: read, slot: "metricsKey" });
read();

// Values in the units that the panels name, as Grafana names them, and the templates of the alerts.

import { number } from "./tokens.js";

const digits = (value, figures = 3) => number(value, { maximumSignificantDigits: figures });
const scaled = (value, base, names) => {
  const step = Math.abs(value) < base ? 0 : Math.min(Math.floor(Math.log(Math.abs(value)) / Math.log(base)), names.length - 1);
  return `${digits(value / base ** step)}${names[step]}`;
};

function seconds(value) {
  if (value === 0) return "0 s";
  if (Math.abs(value) < 0.001) return `${digits(value * 1e6)} µs`;
  if (Math.abs(value) < 1) return `${digits(value * 1e3)} ms`;
  return value < 120 ? `${digits(value)} s` : `${digits(value / 60)} min`;
}

const UNITS = {
  s: seconds,
  short: (value) => scaled(value, 1000, ["", " k", " M", " G"]),
  reqps: (value) => `${digits(value)}/s`,
  ops: (value) => `${digits(value)}/s`,
  percentunit: (value) => `${digits(100 * value)} %`,
  bytes: (value) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]),
  Bps: (value) => `${scaled(value, 1024, [" B", " KiB", " MiB", " GiB"])}/s`,
  "suffix: nats": (value) => `${digits(value)} nats`,
};

/** The function that writes a value in a unit; "–" for a value that is not known. */
export const writer = (unit) => (value) => (value == null || Number.isNaN(value) ? "–" : UNITS[unit](value));

const FILTERS = { humanize: UNITS.short, humanizePercentage: UNITS.percentunit, humanizeDuration: seconds };

/** A text of an alert with its labels and its value in place. */
export const fill = (template, { labels, value }) =>
  template.replace(/\{\{ *\$(labels\.(\w+)|value) *(?:\| *(\w+) *)?\}\}/g, (_, what, label, filter) =>
    what === "value" ? (FILTERS[filter] ?? digits)(value) : (labels[label] ?? ""),
  );

/** A legend with the labels of a series in place. */
export const named = (legend, labels) => legend.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? "");

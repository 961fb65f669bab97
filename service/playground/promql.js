// The part of Prometheus' query language that the panels and the alerts are written in, evaluated on samples.
//
// A query becomes a function (samples, seconds) → its value at the last sample: a number, or a vector, that is, a list of
// {labels, id, value}. `[]` stands for the last `seconds`. As in Prometheus, but increases are not extrapolated.

import { identity } from "./samples.js";

const TOKEN = /\s*(?:(\d+(?:\.\d+)?)|"([^"]*)"|\[(?:(\d+)([smh]))?\]|(=~|!~|==|!=|<=|>=|\w+|[-+*/<>=(){},]))/y;
const UNITS = { s: 1, m: 60, h: 3600 };
const ARITHMETIC = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b };
const COMPARISONS = {
  "==": (a, b) => a === b,
  "!=": (a, b) => a !== b,
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
};
const MATCHES = {
  "=": (value, wanted) => value === wanted,
  "!=": (value, wanted) => value !== wanted,
  "=~": (value, wanted) => new RegExp(`^(?:${wanted})$`).test(value),
  "!~": (value, wanted) => !new RegExp(`^(?:${wanted})$`).test(value),
};
const AGGREGATES = {
  sum: (values) => values.reduce((sum, value) => sum + value, 0),
  max: (values) => Math.max(...values),
  count: (values) => values.length,
};
// Their arguments are queries as functions.
const FUNCTIONS = {
  rate: (range) => overRange(range, ({ grown, duration }) => grown / duration),
  increase: (range) => overRange(range, ({ grown }) => grown),
  sqrt: (query) => (...when) => squareRoots(query(...when)),
  vector: (number) => (...when) => [{ labels: {}, id: identity({}), value: number(...when) }],
  histogram_quantile: (share, buckets) => (...when) => quantiles(share(...when), buckets(...when)),
};
const SETS = {
  or: (left, right) => [...left, ...right.filter(({ id }) => !left.some((item) => item.id === id))],
  and: (left, right) => left.filter(({ id }) => right.some((item) => item.id === id)),
};
// The operators from the loosest to the tightest.
const LEVELS = [["or"], ["and"], Object.keys(COMPARISONS), ["+", "-"], ["*", "/"]];

/** The function of a query; throws SyntaxError for what is not understood. */
export function parse(query) {
  const tokens = [...tokenize(query)];
  const next = () => tokens.shift() ?? {};
  const take = (text) => tokens[0]?.text === text && tokens.shift();
  const wrong = ({ text } = {}) => new SyntaxError(`${text ?? "The end"} is not expected in ${query}`);
  const need = (text) => {
    if (!take(text)) throw wrong(tokens[0]);
  };
  const list = (end, item) => {
    const items = [];
    while (!take(end)) {
      if (items.length) need(",");
      items.push(item());
    }
    return items;
  };

  function level(depth) {
    if (depth === LEVELS.length) return operand();
    let left = level(depth + 1);
    while (LEVELS[depth].includes(tokens[0]?.text)) left = join(next().text, left, level(depth + 1));
    return left;
  }

  function operand() {
    const token = next();
    if (token.number !== undefined) return () => token.number;
    if (token.text === "-") return join("*", () => -1, operand());
    if (token.text === "(") return enclosed();
    if (token.text in AGGREGATES) return aggregate(AGGREGATES[token.text]);
    if (token.text in FUNCTIONS && take("(")) return FUNCTIONS[token.text](...list(")", () => level(0)));
    if (!/^[a-z]/.test(token.text)) throw wrong(token);
    return selector(token.text);
  }

  function enclosed() {
    const inner = level(0);
    need(")");
    return inner;
  }

  function aggregate(combine) {
    const by = take("by") && take("(") ? list(")", () => next().text) : [];
    need("(");
    const inner = enclosed();
    return (...when) => grouped(inner(...when), by, (items) => combine(items.map(({ value }) => value)));
  }

  function selector(name) {
    const matcher = () => [next().text, MATCHES[next().text], next().quoted];
    const matchers = take("{") ? list("}", matcher) : [];
    const matching = (samples) =>
      samples.of(name).filter(({ labels }) => matchers.every(([label, test, text]) => test(labels[label] ?? "", text)));
    if (tokens[0]?.range === undefined) return (samples) => latest(matching(samples));
    const { range } = next();
    return (samples, seconds) => ({ series: matching(samples), seconds: range ?? seconds });
  }

  const parsed = level(0);
  if (tokens.length) throw wrong(tokens[0]);
  return parsed;
}

function* tokenize(query) {
  const text = query.trim();
  TOKEN.lastIndex = 0;
  for (let at = 0; at < text.length; at = TOKEN.lastIndex) {
    const found = TOKEN.exec(text);
    if (!found) throw new SyntaxError(`${text.slice(at)} is not understood`);
    const [whole, number, quoted, amount, unit, sign] = found;
    if (number !== undefined) yield { text: number, number: Number(number) };
    else if (sign !== undefined) yield { text: sign };
    else if (quoted !== undefined) yield { text: whole, quoted };
    else yield { text: whole, range: amount ? amount * UNITS[unit] : null };
  }
}

const latest = (series) =>
  series
    .map(({ labels, id, values }) => ({ labels, id, value: values.at(-1) }))
    .filter(({ value }) => !Number.isNaN(value));

const overRange = (range, value) => (samples, window) => {
  const { series, seconds } = range(samples, window);
  return series.flatMap((one) => {
    const growth = samples.growth(one, seconds);
    return growth ? [{ labels: one.labels, id: one.id, value: value(growth) }] : [];
  });
};

function join(operator, left, right) {
  if (operator in SETS) return (...when) => SETS[operator](left(...when), right(...when));
  const compute = ARITHMETIC[operator];
  if (compute)
    return (...when) => {
      const [a, b] = [left(...when), right(...when)];
      if (typeof a === "number" && typeof b === "number") return compute(a, b);
      return pairs(a, b).map(([item, x, y]) => ({ ...item, value: compute(x, y) }));
    };
  const holds = COMPARISONS[operator];
  return (...when) =>
    pairs(left(...when), right(...when))
      .filter(([, x, y]) => holds(x, y))
      .map(([item]) => item);
}

function squareRoots(value) {
  return Array.isArray(value) ? value.map((item) => ({ ...item, value: Math.sqrt(item.value) })) : Math.sqrt(value);
}

/** What an operator joins: [item, left, right] for items of the same labels, or for each item and a number. */
function pairs(left, right) {
  if (typeof left === "number") return right.map((item) => [item, left, item.value]);
  if (typeof right === "number") return left.map((item) => [item, item.value, right]);
  const others = new Map(right.map(({ id, value }) => [id, value]));
  return left.filter(({ id }) => others.has(id)).map((item) => [item, item.value, others.get(item.id)]);
}

/** One item for each combination of the labels, with the value combine(items). */
function grouped(vector, names, combine) {
  const chosen = (labels) => Object.fromEntries(names.filter((name) => name in labels).map((name) => [name, labels[name]]));
  return [...Map.groupBy(vector, ({ labels }) => identity(chosen(labels)))].map(([id, items]) => ({
    labels: chosen(items[0].labels),
    id,
    value: combine(items),
  }));
}

/** A quantile of each histogram, linear within a bucket. */
function quantiles(share, buckets) {
  const names = new Set(buckets.flatMap(({ labels }) => Object.keys(labels)));
  names.delete("le");
  return grouped(buckets, [...names], (items) => quantile(share, items));
}

function quantile(share, items) {
  const bounds = items
    .map(({ labels, value }) => ({ end: labels.le === "+Inf" ? Infinity : Number(labels.le), count: value }))
    .sort((a, b) => a.end - b.end);
  const rank = share * bounds.at(-1).count;
  if (!(rank > 0)) return Number.NaN;
  const i = bounds.findIndex(({ count }) => count >= rank);
  const { end, count } = bounds[i];
  if (end === Infinity) return bounds[i - 1]?.end ?? Number.NaN;
  if (i === 0) return end > 0 ? (end * rank) / count : end;
  const before = bounds[i - 1];
  return before.end + ((end - before.end) * (rank - before.count)) / (count - before.count);
}

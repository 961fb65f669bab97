// The server's metrics as they were read, one value of each series a sample, over a bounded window.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n" };

/** The identity of a set of labels. */
export const identity = (labels) => JSON.stringify(Object.entries(labels).sort(([a], [b]) => (a < b ? -1 : 1)));

function labelsOf(text = "") {
  const pairs = [...text.matchAll(LABEL)];
  return Object.fromEntries(pairs.map(([, name, value]) => [name, value.replace(/\\(.)/g, (_, c) => ESCAPED[c] ?? c)]));
}

export class Samples {
  times = []; // of the samples, in seconds, ascending
  answered = []; // whether the server answered, by sample
  leftOut = 0; // series beyond the limit, in the last sample
  #series = new Map(); // {name, labels, id, values}, by name and labels as they are written
  #byName = new Map();

  /** names: the series that are kept; shared: labels that each series gets. */
  constructor({ names, shared, maxSamples, maxSeries }) {
    Object.assign(this, { names: new Set(names), shared, maxSamples, maxSeries });
  }

  /** Adds a sample of Prometheus' text exposition. seconds: when it was read. */
  add(seconds, exposition, answered = true) {
    this.times.push(seconds);
    this.answered.push(answered);
    this.leftOut = 0;
    for (const { values } of this.#series.values()) values.push(Number.NaN);
    for (const line of exposition.split("\n")) {
      const [, name, labels, value] = LINE.exec(line) ?? [];
      if (!this.names.has(name)) continue;
      const series = this.#find(name, labels);
      if (series) series.values[this.times.length - 1] = Number(value);
      else this.leftOut++;
    }
    if (this.times.length > this.maxSamples) this.#forgetFirst();
  }

  #find(name, text) {
    const key = `${name} ${text}`;
    if (!this.#series.has(key) && this.#series.size < this.maxSeries) {
      const labels = { ...labelsOf(text), ...this.shared };
      const values = this.times.map(() => Number.NaN);
      this.#series.set(key, { name, labels, id: identity(labels), values });
      this.#index();
    }
    return this.#series.get(key);
  }

  #forgetFirst() {
    this.times.shift();
    this.answered.shift();
    for (const [key, { values }] of this.#series) {
      values.shift();
      if (values.every(Number.isNaN)) this.#series.delete(key); // of a server that was started again
    }
    this.#index();
  }

  #index() {
    this.#byName = Map.groupBy(this.#series.values(), ({ name }) => name);
  }

  /** The series of a name. */
  of(name) {
    return this.#byName.get(name) ?? [];
  }

  /** The index of the first sample of the last `seconds`. */
  first(seconds) {
    const start = this.times.at(-1) - seconds - 0.001;
    return this.times.findIndex((time) => time >= start);
  }

  /** By how much a counter grew in the last `seconds`, and in what time; undefined where nothing is known. */
  growth({ values }, seconds) {
    let [grown, from, last] = [0, undefined, undefined];
    for (let i = this.first(seconds); i < values.length; i++) {
      if (Number.isNaN(values[i])) {
        if (last === undefined && this.answered[i]) from ??= i;
        continue;
      }
      if (last === undefined) grown = from === undefined ? 0 : values[i]; // its first event made the counter appear
      else grown += values[i] >= last ? values[i] - last : values[i]; // less than before: the server was started again
      from ??= i;
      last = values[i];
    }
    const duration = this.times.at(-1) - this.times[from];
    return last !== undefined && duration > 0 ? { grown, duration } : undefined;
  }
}

// The watched text, whose loss the curve shows version by version; and how texts come and are cut.

import { json, sessionPath } from "./server.js";
import { nats } from "./tokens.js";

const WATCHED = 700; // characters of a text that is watched
const SHORT = 12_000; // characters up to which a text is learned in small pieces, to be watched

/** The pieces that a text is learned in. One whose answer was lost comes again as it was, so that it is learned once. */
export function pieces(text, lost = "") {
  if (lost && text.startsWith(lost)) return [lost, ...pieces(text.slice(lost.length))];
  const [least, most] = text.length > SHORT ? [2000, 4000] : [300, 600];
  const some = `[^]{${least},${most}}`; // up to a blank line, else the end of a sentence, a space or the limit
  const ends = ["(?:\\n\\s*\\n|$)", "(?:\\n|[.!?][\"'”’)]*\\s)", "\\s"];
  return text.match(new RegExp([...ends.map((end) => some + end), `[^]{1,${most}}`].join("|"), "gu")) ?? [];
}

/** A text that comes with the page. */
export const sample = async (name) => (await fetch(`playground/samples/${name}.txt`)).text();

export class Watch {
  text = "";
  #what = "";
  #frozen = null;
  #points = new Map(); // adapted losses, by version

  /** Watches the beginning of a text, or its end, instead; `what` says which it is. */
  turn(text, what, { end = false } = {}) {
    this.text = end ? text.slice(-WATCHED).trim() : text.slice(0, WATCHED);
    this.#what = what;
    this.forget();
  }

  /** The session is another one. */
  forget() {
    this.#frozen = null;
    this.#points = new Map();
  }

  get begun() {
    return this.#points.size > 0;
  }

  async measure(session, signal) {
    if (!this.text) return;
    const points = this.#points;
    const body = { text: this.text };
    const { loss, frozen_loss, version } = await json(sessionPath(session, "score"), { body, signal });
    points.set(version, loss);
    if (points === this.#points) this.#frozen = frozen_loss;
  }

  /** Versions, frozen and adapted losses. */
  get data() {
    const versions = [...this.#points.keys()].sort((a, b) => a - b);
    return [versions, versions.map(() => this.#frozen), versions.map((version) => this.#points.get(version))];
  }

  get told() {
    if (!this.text) return "Watches the end of the first text that you let it learn, or the draft.";
    if (!this.begun) return `Watched: ${this.#what}. Its curve begins when something is learned.`;
    const [versions, , losses] = this.data;
    const [frozen, adapted] = [this.#frozen, losses.at(-1)];
    const now = `${nats(adapted)} with version ${versions.at(-1)}`;
    const perplexity = `perplexity ${nats(Math.exp(frozen))} and ${nats(Math.exp(adapted))}`;
    return `Watched: ${this.#what}. ${nats(frozen)} nats a token for the frozen base, ${now}: ${perplexity}.`;
  }
}

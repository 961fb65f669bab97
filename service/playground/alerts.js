// The alerts: whether each rule holds for this server, since when, and what to do about it.

import { element } from "./elements.js";
import { parse } from "./promql.js";
import { fill } from "./units.js";

const SECONDS = { s: 1, m: 60, h: 3600 };
const RANK = { firing: 0, pending: 1, quiet: 2 };
const seconds = (text) => Number.parseInt(text) * SECONDS[text.at(-1)];
const minutes = (time) => `${Math.floor(time / 60)} min`;
const words = (name) => name.replace(/^Imprint/, "").replace(/(?!^)([A-Z])/g, (letter) => ` ${letter.toLowerCase()}`);

class Alert {
  state = "quiet";
  #since = null; // when the condition began to hold
  #found = [];
  #line = element("span", { className: "told" });
  #mark = element("b");

  constructor({ name, query, for: wait, severity, summary, runbook }) {
    Object.assign(this, { name, summary, severity, wait: seconds(wait) });
    this.evaluate = parse(query);
    this.place = element(
      "details",
      {},
      element("summary", {}, this.#mark, element("span", { className: "name" }, words(name)), this.#line),
      element("p", {}, element("b", {}, "What to do. "), runbook),
      element("p", { className: "help" }, `${name}, severity ${severity}. Fires when this holds${this.wait ? ` for ${minutes(this.wait)}` : ""}:`),
      element("pre", { tabIndex: 0 }, element("code", {}, query)),
    );
  }

  sample(samples) {
    this.#found = this.evaluate(samples);
    const now = samples.times.at(-1);
    this.#since = this.#found.length ? (this.#since ?? now) : null;
    this.held = this.#found.length ? now - this.#since : 0;
    const before = this.state;
    this.state = !this.#found.length ? "quiet" : this.held >= this.wait ? "firing" : "pending";
    return before !== this.state;
  }

  draw() {
    this.place.className = `alert ${this.state} ${this.severity}`;
    this.#mark.textContent = this.state;
    const about = this.state === "pending" ? ` For ${minutes(this.held)} of ${minutes(this.wait)}.` : "";
    this.#line.textContent = this.#found.length ? fill(this.summary, this.#found[0]) + about : "";
  }
}

/** Shows the alerts in `place`, those that fire first and open. told(text) is given what the change of one means. */
export class Alerts {
  #alerts;
  #count = element("p", { id: "verdict", role: "status" });
  #urgent = element("div", { className: "urgent" });
  #quiet = element("div");
  #rest = element("details", { id: "rules" }, element("summary", {}, "All rules, and what to do about each"), this.#quiet);

  constructor(rules, place) {
    this.#alerts = rules.map((rule) => new Alert(rule));
    place.append(this.#count, this.#urgent, this.#rest);
    this.#arrange();
  }

  sample(samples) {
    const changed = this.#alerts.filter((alert) => alert.sample(samples));
    for (const alert of changed) alert.place.open = alert.state === "firing";
    if (changed.length) this.#arrange();
  }

  draw() {
    for (const alert of this.#alerts) alert.draw();
    const firing = this.#alerts.filter(({ state }) => state === "firing").length;
    const pending = this.#alerts.filter(({ state }) => state === "pending").length;
    const text =
      (firing ? `${firing} of ${this.#alerts.length} alerts fire` : `No alert fires`) + (pending ? `, ${pending} may soon.` : ".");
    if (this.#count.textContent !== text) this.#count.textContent = text;
    this.#count.className = firing ? "firing" : pending ? "pending" : "quiet";
  }

  #arrange() {
    const order = this.#alerts.toSorted((a, b) => RANK[a.state] - RANK[b.state]);
    this.#urgent.replaceChildren(...order.filter(({ state }) => state !== "quiet").map(({ place }) => place));
    this.#quiet.replaceChildren(...order.filter(({ state }) => state === "quiet").map(({ place }) => place));
  }
}

// What the session has learned while the page was open, tinted as it was predicted before it was learned.

import { describe, nats, span } from "./tokens.js";

const SHOWN = 24; // passages, the newest

function passage(version, { text, parts }, loss) {
  const whole = document.createElement("div");
  const mark = Object.assign(document.createElement("span"), { className: "mark", textContent: version });
  const body = document.createElement("p");
  whole.setAttribute("role", "group");
  whole.setAttribute("aria-label", `Version ${version}${loss == null ? "" : `, loss ${nats(loss)}`}`);
  mark.setAttribute("aria-hidden", true);
  body.append(...(parts ? parts.map(span) : [text]));
  for (const token of parts ? body.children : []) token.tabIndex = -1;
  whole.append(mark, body);
  return whole;
}

/** `place` becomes a group of passages; show(text) tells of the token that has the focus or the pointer. */
export function makeManuscript(place, show) {
  place.addEventListener("focusin", ({ target }) => {
    if (!target.told) return;
    for (const token of place.querySelectorAll("[tabindex='0']")) token.tabIndex = -1;
    target.tabIndex = 0;
    show(describe(target.told));
  });
  place.addEventListener("pointerover", ({ target }) => {
    if (target.told) show(describe(target.told));
  });
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const tokens = [...place.querySelectorAll("p > span")];
    tokens[tokens.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  });

  return {
    /** Shows the newest passages of these versions; returns how many. passages, log: by version. */
    draw(versions, passages, log) {
      const last = place.lastElementChild?.version;
      const old = new Map([...place.children].map((one) => [one.version, one]));
      const shown = versions.slice(-SHOWN).map((version) => {
        const data = passages.get(version);
        if (old.get(version)?.data === data) return old.get(version);
        return Object.assign(passage(version, data, log.get(version)?.loss), { version, data });
      });
      place.replaceChildren(...shown);
      if (shown.at(-1)?.version !== last) place.scrollTop = place.scrollHeight;
      const first = place.querySelector("p > span");
      if (first && !place.querySelector("[tabindex='0']")) first.tabIndex = 0;
      return shown.length;
    },
  };
}

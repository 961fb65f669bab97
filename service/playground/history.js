// A session's log: what its versions consist of, what they are listed as, and what lies between two of them.

import { count, nats, number } from "./tokens.js";

/** The versions whose lessons a version consists of, in order. log: entries by version. */
export function lineage(log, version) {
  const entry = log.get(version);
  if (!entry) return [];
  if (entry.kind === "rollback") return lineage(log, entry.of);
  const before = lineage(log, version - 1);
  if (entry.kind === "unlearn") return before.filter((one) => ![entry.of].flat().includes(one));
  return entry.kind === "learn" ? [...before, version] : [version];
}

/** The version that one is what it is since: itself, or where it was gone back to. */
export function origin(log, version) {
  const entry = log.get(version);
  return entry?.kind === "rollback" ? origin(log, entry.of) : version;
}

const job = (entry) => entry.request_id.match(/^page\.\w+(?=\.\d+$)/)?.[0];

/** The log's entries, oldest first, with those of one text that was learned in pieces together. */
export function steps(log) {
  const found = [];
  for (const entry of [...log.values()].sort((a, b) => a.version - b.version)) {
    const last = found.at(-1);
    if (last && job(entry) && job(entry) === job(last[0])) last.push(entry);
    else found.push([entry]);
  }
  return found;
}

/** To which version an undo goes: before the text that was learned last; undefined if there is nothing to undo. */
export function undoes(log, version) {
  const now = origin(log, version);
  const step = steps(log).find((entries) => entries.some((entry) => entry.version === now));
  return step && step[0].version - 1;
}

const WORDS = {
  rollback: (entry) => `went back to ${entry.of}`,
  unlearn: (entry) => `unlearned ${entry.of}`,
  fork: (entry) => `forked from ${entry.of}`,
  import: (entry) => `imported ${entry.of}`,
};

function told(step) {
  if (step[0].kind !== "learn") return WORDS[step[0].kind](step[0]);
  const tokens = step.reduce((sum, entry) => sum + entry.tokens, 0);
  const loss = step.reduce((sum, entry) => sum + entry.tokens * (entry.loss ?? 0), 0);
  return `learned ${count(tokens, "token")}${tokens ? `, loss ${nats(loss / tokens)}` : ""}`;
}

/** The list of what became of the session, newest first; `back(version)` is called to go to one. */
export function list(log, version, back) {
  const present = new Set(lineage(log, version));
  const now = origin(log, version);
  return steps(log)
    .reverse()
    .map((step) => {
      const item = document.createElement("li");
      const [first, last] = [step[0].version, step.at(-1).version];
      const name = first === last ? `${last}` : `${first}–${last}`;
      item.append(Object.assign(document.createElement("b"), { textContent: name }), ` ${told(step)} `);
      const here = last === now;
      if (here) item.setAttribute("aria-current", "true");
      if (step[0].kind === "learn" && !step.some((entry) => present.has(entry.version))) item.className = "undone";
      const note = here ? "now" : item.className && "undone";
      if (note) item.append(Object.assign(document.createElement("em"), { textContent: note }), " ");
      if (!here && step[0].kind !== "rollback") {
        const button = Object.assign(document.createElement("button"), {
          type: "button",
          className: "link",
          textContent: `Return to ${last}`,
        });
        button.addEventListener("click", () => back(last));
        item.append(button);
      }
      return item;
    });
}

/** What the answer of /diff says, as a sentence and as items. */
export function difference({ from, to, tokens_learned, rows, learned, forgotten }) {
  const sum = (name) => Object.values(rows).reduce((all, site) => all + site[name], 0);
  const sentence =
    `From ${from} to ${to}: ${number(tokens_learned, { signDisplay: "exceptZero" })} tokens learned; ` +
    `${count(sum("added"), "row")} added, ${number(sum("removed"))} removed, ${number(sum("changed"))} replaced.`;
  const items = [...forgotten.map((entry) => ["−", entry]), ...learned.map((entry) => ["+", entry])];
  return [sentence, items.map(([sign, entry]) => lesson(sign, entry))];
}

function lesson(sign, entry) {
  const item = document.createElement("li");
  const loss = entry.loss === null ? "" : `, loss ${nats(entry.loss)}`;
  item.className = sign === "+" ? "added" : "removed";
  item.append(Object.assign(document.createElement("b"), { textContent: `${sign} ${entry.version}` }));
  item.append(
    ` ${entry.kind === "learn" ? `${count(entry.tokens, "token")}, ${count(entry.rows, "row")}${loss}` : told([entry])}`,
  );
  if (entry.text) item.append(Object.assign(document.createElement("q"), { textContent: shorten(entry.text) }));
  return item;
}

const shorten = (text) => (text.length > 160 ? `${text.slice(0, 100)} … ${text.slice(-50)}` : text).trim();

// What is remembered about a person: cards, and the list of all of them, which can be searched.

import { action, element, moment } from "./elements.js";
import { json, sessionPath } from "./server.js";

const PAUSE_MS = 250;
const SHOWN = 20; // at a time
let number = 0;

/** A card of something remembered; change(kind, entry) is called with "correct" or "forget". entry: {version, text, time}. */
export function card(entry, change) {
  const id = `said-${++number}`;
  const act = (kind, label) => action(label, () => change(kind, entry));
  const item = element(
    "li",
    { className: "entry" },
    element("q", { id }, entry.text.trim()),
    element("p", { className: "source" }, "You said so ", moment(entry.time), "."),
    element("p", { className: "acts" }, act("correct", "Correct"), " ", act("forget", "Forget")),
  );
  for (const button of item.querySelectorAll("button")) button.setAttribute("aria-describedby", id);
  item.dataset.version = entry.version;
  return item;
}

/** The messages that texts were said in, the newest first; a long message comes in several texts, the last one first. */
function messages(texts) {
  const found = [];
  for (const { ordinal, version, offset, time, text } of texts) {
    const last = found.at(-1);
    const belongs = last?.version === version && offset < last.offset;
    if (!belongs) found.push({ ordinal, version, offset, time, text });
    else Object.assign(last, { text: `${text}${ordinal === last.ordinal - 1 ? "" : " … "}${last.text}`, ordinal, offset });
  }
  return found;
}

/** memory() names the memory whose list is shown, or is ""; failed(error) tells of a fault, shown(any) whether there is any. */
export function makeKnown({ place, memory, change, failed, shown }) {
  const [query, questions, list, note, more] = ["#query", "#questions", "ul", "[role=status]", "#more"].map((one) =>
    place.querySelector(one),
  );
  let texts = [];
  let next = null;
  let asked = 0;
  let timer;

  function show() {
    list.replaceChildren(...messages(texts).map((entry) => card(entry, change)));
    more.hidden = next === null;
    const nothing = query.value.trim() ? "Nothing like that." : "Nothing yet. What you tell me appears here.";
    note.textContent = texts.length ? "" : nothing;
    shown(memory() !== "");
  }

  /** Asks for the list anew, or for the older rest of it. */
  async function refresh({ older = false } = {}) {
    clearTimeout(timer);
    const turn = ++asked;
    const wanted = new URLSearchParams({ limit: SHOWN, query: query.value.trim() });
    if (!questions.checked) wanted.set("asks", false);
    if (older) wanted.set("before", next);
    const page = memory()
      ? await json(sessionPath(memory(), `episodes?${wanted}`))
      : { data: [], next: null };
    if (turn !== asked) return;
    texts = older ? [...texts, ...page.data] : page.data;
    next = page.next;
    show();
  }

  const ask = (options) => refresh(options).catch(failed);
  query.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, PAUSE_MS);
  });
  query.form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  questions.addEventListener("change", () => ask());
  more.addEventListener("click", () => ask({ older: true }));
  return {
    refresh,
    get isEmpty() {
      return texts.length === 0 && !query.value.trim();
    },
  };
}

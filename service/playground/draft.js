// The draft: a text field over a backdrop that tints its tokens and shows what the model would write next.

import { stopped } from "./server.js";
import { describe, span, whole } from "./tokens.js";

const PAUSE_MS = 350;
const LONGEST = 6000; // characters that are scored, and laid out twice, while one writes

/**
 * ready() tells whether the server may be asked, suggests() whether for suggestions, too. ask(prompt, signal) yields
 * pieces of a completion, score(text, signal) gives its tokens' probabilities. show(text) tells of a token,
 * failed(error) of a fault, changed() that the text is another.
 */
export function makeDraft({ field, backdrop, announce, ready, suggests, ask, score, show, failed, changed }) {
  const tail = document.createTextNode("");
  const ghost = Object.assign(document.createElement("span"), { className: "ghost" });
  const end = document.createTextNode("\u200b"); // gives a last empty line its height
  backdrop.append(tail, ghost, end);
  let spans = [];
  let timer;
  let asking = new AbortController();
  let typed = 0;
  let unseen = false; // the text, or the memory, is another since the last look that came to its end

  const parts = () => spans.map((one) => one.told);
  const lengthOf = (some) => some.reduce((sum, one) => sum + one.told.text.length, 0);
  const dropGhost = () => {
    ghost.textContent = announce.textContent = "";
  };

  /** Keeps the tints of the tokens before the first change. */
  function repaint() {
    const long = field.value.length > LONGEST;
    const text = long ? "" : field.value;
    field.parentNode.classList.toggle("long", long);
    let at = 0;
    const kept = spans.findIndex((one) => {
      if (!text.startsWith(one.told.text, at)) return true;
      at += one.told.text.length;
      return false;
    });
    for (const gone of kept < 0 ? [] : spans.splice(kept)) gone.remove();
    tail.data = text.slice(at);
  }

  function paint(text, scored) {
    for (const old of spans) old.remove();
    spans = [...whole(text, scored)].map(span);
    backdrop.prepend(...spans);
    tail.data = field.value.slice(lengthOf(spans));
  }

  function quiet() {
    clearTimeout(timer);
    asking.abort();
    asking = new AbortController();
    dropGhost();
  }

  function atEnd() {
    return document.activeElement === field && field.selectionStart === field.value.length && field.value.trim() !== "";
  }

  async function suggest(signal) {
    const text = field.value;
    const blank = text.endsWith(" "); // which the model wants in front of the next word
    for await (const piece of ask(blank ? text.slice(0, -1) : text, signal)) {
      ghost.append(piece);
      if (blank && !ghost.textContent.startsWith(" ")) return dropGhost();
    }
    if (blank) ghost.textContent = ghost.textContent.slice(1);
    if (ghost.textContent) announce.textContent = `Suggestion: ${ghost.textContent}. Tab takes it, Escape drops it.`;
    else show("No suggestion: here the model ends the paragraph.");
  }

  async function look() {
    const text = field.value;
    const { signal } = asking;
    if (!ready()) return;
    try {
      const work = text.trim() && text.length <= LONGEST ? [score(text, signal).then((told) => paint(text, told))] : [];
      if (suggests() && atEnd()) work.push(suggest(signal));
      await Promise.all(work);
      if (!signal.aborted) unseen = false;
    } catch (error) {
      if (!stopped(error)) failed(error);
    }
    changed();
  }

  function later() {
    quiet();
    unseen = true;
    timer = setTimeout(look, PAUSE_MS);
  }

  /** A long text goes in at once: the browser's own way lays it out anew for each line. */
  function paste(event) {
    const text = event.clipboardData.getData("text/plain");
    if (text.length <= LONGEST) return;
    event.preventDefault();
    type(text.replaceAll("\r\n", "\n"));
  }

  function type(text) {
    field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
    field.dispatchEvent(new InputEvent("input", { bubbles: true }));
  }

  field.addEventListener("input", () => {
    typed = Date.now();
    repaint();
    later();
    changed();
  });
  field.addEventListener("keydown", (event) => {
    if (!ghost.textContent || event.shiftKey || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Tab") {
      event.preventDefault();
      type(ghost.textContent);
    } else if (event.key === "Escape") {
      quiet();
      unseen = false;
    }
  });
  field.addEventListener("paste", paste);
  field.addEventListener("blur", dropGhost);
  field.addEventListener("focus", () => {
    if (suggests() && field.value.trim()) later();
  });
  field.addEventListener("mousemove", ({ clientX, clientY }) => {
    const under = document.elementsFromPoint(clientX, clientY).find((one) => one.told && one.parentNode === backdrop);
    if (under) show(describe(under.told));
  });
  document.addEventListener("selectionchange", () => {
    if (document.activeElement !== field || Date.now() - typed < 2 * PAUSE_MS) return;
    if (field.selectionStart < field.value.length) dropGhost();
    let at = 0;
    const here = parts().find((part) => (at += part.text.length) > field.selectionStart);
    if (here) show(describe(here));
  });

  return {
    get text() {
      return field.value;
    },
    set text(value) {
      field.value = value;
      unseen = true;
      repaint();
      changed();
    },
    /** Takes the text away, to be worked on while one writes the next. */
    take() {
      const text = field.value;
      this.text = "";
      return text;
    },
    /** Puts a text back before what was written since; the caret stays where it is. */
    putBack(text) {
      if (!text) return;
      const gap = field.value && !/\s$/.test(text) ? "\n" : "";
      field.setRangeText(text + gap, 0, 0, "preserve");
      unseen = true;
      repaint();
      changed();
    },
    /** Tokens with both log-probabilities, as far as the text is scored. */
    get parts() {
      return parts();
    },
    look: later,
    quiet,
    /** Looks at what could not be looked at when it was written, or no longer. */
    resume() {
      if (unseen) later();
    },
    /** Forgets the tints, which another memory made. */
    stale() {
      for (const old of spans.splice(0)) old.remove();
      tail.data = field.value;
      later();
    },
  };
}

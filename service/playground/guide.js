// The first minute: one line that says what to do next, and a button that does it.

import { sample } from "./watch.js";

const LINE = "Osric Pell has a stone in the churchyard at";

/**
 * busy() tells whether something runs, learned() whether the session has learned; watched(text, what) makes a text the
 * watched one. Returns a function that shows the line of now. Nothing that was written is overwritten.
 */
export function makeGuide({ place, button, busy, learned, draft, field, prompt, watched }) {
  async function putIn() {
    const [next, text] = await Promise.all([sample("keeper-2"), sample("keeper-1")]);
    if (draft.text || learned()) return; // written, or learned, while the samples came
    watched(next.slice(0, next.lastIndexOf("\n\n", 700)), "the beginning of the next page, which it never reads");
    draft.text = text;
  }

  function tryLine() {
    draft.text = LINE;
    prompt.value ||= LINE;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
    draft.look();
  }

  const steps = [
    [busy, ""],
    [
      () => !learned() && !draft.text,
      "New here? Begin with a page of a story that no model has read.",
      "Put in the page",
      putIn,
    ],
    [
      () => !learned(),
      "Underlined blue is what the memory predicts better, dotted orange what it predicts worse. It knows nothing yet: let it learn the page.",
    ],
    [
      () => !draft.text,
      "Write on, and take what it suggests; or see what it has learned.",
      "Try a line",
      tryLine,
    ],
    [() => true, ""],
  ];

  return () => {
    const [, text, label, work] = steps.find(([applies]) => applies());
    if (place.textContent !== text) place.textContent = text;
    button.hidden = !label;
    button.textContent = label ?? "";
    button.onclick = work;
  };
}

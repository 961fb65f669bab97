// The turns of a conversation as they are shown: what somebody said, the answer, and what the answer remembered.

import { action, element } from "./elements.js";
import { card } from "./known.js";

export class Turn {
  answer = ""; // so far
  remembered = []; // the versions of the memory that the answer has read
  version = null; // of the memory, that what was said made
  #text = element("p", { className: "text" });
  #note = element("p", { className: "note" });
  #cards = element("ul", { className: "entries" });
  #memory = element("section", { className: "remembered", hidden: true }, element("h3", {}, "Remembered"), this.#cards);
  #acts = element("p", { className: "acts", hidden: true });
  #you;
  #change;

  /** key: under which it is taught. again(turn) asks for another answer, copied() is called, change is a card's. */
  constructor(said, key, { again, copied, change }) {
    Object.assign(this, { said, key });
    this.#change = change;
    this.#you = element("p", { className: "text" }, said);
    if (navigator.clipboard) {
      const copy = () => navigator.clipboard.writeText(this.answer).then(copied);
      this.#acts.append(action("Copy", copy), " ");
    }
    this.again = action("Answer again", () => again(this));
    this.#acts.append(this.again);
    this.place = element(
      "li",
      { className: "turn" },
      element("div", { className: "you" }, element("h3", { className: "hidden" }, "You"), this.#you),
      element(
        "div",
        { className: "answer" },
        element("h3", { className: "hidden" }, "Answer"),
        this.#memory, // first: what the person said is right more often than what a small model makes of it
        this.#text,
        this.#note,
        this.#acts,
      ),
    );
  }

  begin() {
    this.answer = this.#text.textContent = this.#note.textContent = "";
    this.#memory.hidden = this.#acts.hidden = true;
    this.place.classList.remove("outdated");
    this.place.ariaBusy = true;
  }

  add(piece) {
    this.answer += piece;
    this.#text.textContent = this.answer.trimStart();
  }

  /** Shows what the answer has read, the oldest first. */
  remember(recalled) {
    this.remembered = recalled.map(({ version }) => version);
    this.#cards.replaceChildren(...recalled.map((entry) => card(entry, this.#change)));
    this.#memory.hidden = recalled.length === 0;
  }

  /** note: what is to be said about how it ended. */
  end(note = "") {
    this.place.ariaBusy = false;
    this.#note.textContent = note;
    this.#acts.hidden = false;
    this.again.textContent = this.version === null ? "Try again" : "Answer again";
  }

  /** Shows that what a version taught is no longer remembered. text: what it was corrected to, or "". */
  settle(version, text) {
    const gone = text ? `Corrected: ${text}` : "Forgotten.";
    if (this.version === version) {
      this.#you.replaceChildren(element("em", {}, gone));
      this.said = text;
    }
    if (this.remembered.includes(version)) {
      this.place.classList.add("outdated");
      this.#note.textContent = `This answer is from before you ${text ? "corrected what it remembered" : "had it forgotten"}.`;
    }
    for (const item of this.#cards.querySelectorAll(`[data-version="${version}"]`))
      item.replaceChildren(element("em", {}, gone));
  }
}

// Two sessions, or a session and the frozen base, on the same prompt.

import { events, json, sessionPath } from "./server.js";
import { count, nats } from "./tokens.js";

export const FROZEN = "";

/** Streams a completion into the side's text, the prompt before it; its note says if nothing came. */
async function complete({ text, note }, prompt, stream) {
  const given = Object.assign(document.createElement("span"), { className: "given", textContent: prompt });
  const said = document.createTextNode("");
  text.replaceChildren(given, said);
  text.setAttribute("aria-busy", true);
  try {
    for await (const event of stream) said.appendData(event.choices[0].text);
    if (said.data === "") note.textContent = "Nothing to add: here the model ends the text. ";
    else if (!said.data.trim()) note.textContent = "Added nothing but white space. ";
  } finally {
    text.setAttribute("aria-busy", false);
  }
}

/** How well each memory predicts the prompt, the frozen base among them. */
async function judge(names, prompt, signal) {
  const told = new Map();
  const asked = names.filter((name) => name !== FROZEN);
  for (const name of asked) {
    const scored = await json(sessionPath(name, "score"), { body: { text: prompt }, signal });
    told.set(name, scored.loss).set(FROZEN, scored.frozen_loss);
  }
  return told;
}

/** sides: [{name, text, note}, …]; the same seed for all, so that only the memory makes a difference. */
export async function compare(sides, request, signal) {
  const seed = Math.floor(Math.random() * 2 ** 31);
  for (const side of sides) side.note.textContent = "";
  await Promise.all(
    sides.map((side) => {
      const use = side.name === FROZEN ? {} : { session: side.name, adapt: "predict" };
      return complete(
        side,
        request.prompt,
        events("v1/completions", { body: { ...request, ...use, seed, stream: true }, signal }),
      );
    }),
  );
  const losses = await judge(
    sides.map((side) => side.name),
    request.prompt,
    signal,
  );
  for (const { name, note } of sides) {
    const loss = losses.get(name);
    if (loss !== undefined) note.append(`Perplexity of the prompt: ${nats(Math.exp(loss))}.`);
  }
  return count(sides.length, "completion");
}

/** The options of a choice of sessions, the frozen base last. */
export function choices(select, names, wanted) {
  const values = [...names, FROZEN];
  const keep = wanted ?? select.value;
  select.replaceChildren(...values.map((name) => new Option(name || "frozen base", name)));
  select.value = values.includes(keep) ? keep : FROZEN;
}

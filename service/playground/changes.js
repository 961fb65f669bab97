// Correcting and forgetting: what a message taught is taken back, once, however often it has to be tried.

import { json, sessionPath } from "./server.js";

const GONE = ["version_not_kept", "text_not_kept"]; // another window has taken it back, or it is an imported one
const LONGEST = 100; // texts of a message

export const newKey = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");

/** Teaches what was said; a key is answered once. */
export const teach = (memory, text, key, signal) =>
  json(sessionPath(memory, "observe"), { body: { text }, headers: { "Idempotency-Key": key }, signal });

/** All that was said in a message: its text, or what is remembered of a message whose text is not kept. */
export async function wholeMessage(memory, version) {
  const { data } = await json(sessionPath(memory, `log?limit=1&before=${version + 1}`));
  if (data[0]?.version === version && data[0].text) return data[0].text.trim();
  const parts = (await json(sessionPath(memory, `episodes?version=${version}&limit=${LONGEST}`))).data;
  return parts.map((part) => part.text).reverse().join("").trim();
}

/**
 * Teaches `text`, if there is one, in the place of what version `version` taught, or only erases that, for good. The
 * change and its key stay in `kept` until all of it is done, so that a page that is opened again ends it.
 */
export async function change(kept, memory, version, text = "") {
  const begun = kept.change ? JSON.parse(kept.change) : {};
  if (begun.memory !== memory || begun.version !== version || begun.text !== text) {
    await finishChange(kept);
    kept.change = JSON.stringify({ memory, version, text, key: newKey() });
  }
  await finishChange(kept);
}

/** Ends a change that was begun, if there is one. */
export async function finishChange(kept) {
  if (!kept.change) return;
  const { memory, version, text, key } = JSON.parse(kept.change);
  try {
    if (text) await teach(memory, text, `${key}.taught`);
    const headers = { "Idempotency-Key": `${key}.taken` };
    await json(sessionPath(memory, "unlearn"), { body: { version, erase: !text }, headers });
  } catch (error) {
    if (error.status && error.status < 500 && error.status !== 429) delete kept.change; // trying again would not help
    if (!(text && GONE.includes(error.code))) throw error; // the new words count
  }
  delete kept.change;
}

// The page's first face: a person says who they are, tells things and asks for them in later conversations.

import { change, finishChange, newKey, teach, wholeMessage } from "./changes.js";
import { action, element, moment } from "./elements.js";
import { makeKnown } from "./known.js";
import { memoryOf } from "./person.js";
import { events, find, json, offered, sessionPath, stopped, whyUnusable } from "./server.js";
import { kept, makeShell } from "./shell.js";
import { Turn } from "./turns.js";

const RETRY_MS = 1000;
const LONGEST_ANSWER = 512;
const EARLIER = 6000; // characters of the conversation that come with a question
const SMALL = 3e8; // parameters of a base below which it repeats earlier answers instead of answering: none come with a question
const NEAR_END = 160; // pixels
const STATES = { loading: "Getting ready. This can take a minute.", draining: "Restarting. This takes a moment." };
const EXAMPLES = ["My cat is called Miso and she sleeps on the radiator.", "I work at the bakery on Mill Lane on Fridays."];

const $ = (id) => document.getElementById(id);
const message = $("message");

let served = null; // the models, while the server is ready
let memory = ""; // the id of the person's memory
let exists = false; // whether the server has it
let turns = [];
let first = 0; // the turn from which on the conversation comes with a question
let busy = null; // what runs now, to be aborted
let asked = 0;

const announce = (text) => ($("announcement").textContent = text);
const say = (text) => {
  if ($("state").textContent !== text) $("state").textContent = text;
};

/** What went wrong, without the server's own terms. */
function plain(error) {
  const words = {
    401: "That key is not known here.",
    413: "That is too long.",
    429: "Too busy now. Try again in a moment.",
    503: "Too busy now. Try again in a moment.",
    507: "There is no room for more.",
  };
  if (!error.status) return error.message;
  const codes = {
    context_length_exceeded: "I remember it, but it is too long for an answer. Ask about a part of it.",
    version_not_kept: "It was taken back already.",
  };
  if (error.code in codes) return codes[error.code];
  return words[error.status] ?? `That did not work (error ${error.status}).`;
}

// --- who it is ---

/** Asks until the server is ready, then shows the person's memory, or asks who it is. */
async function open() {
  const turn = ++asked;
  try {
    const models = await offered(STATES);
    if (turn !== asked) return;
    served = models;
    $("door").hidden = true;
    say("");
    await enter(kept.person ?? "");
  } catch (error) {
    if (turn !== asked) return;
    $("door").hidden = error.status !== 401;
    say(error.status === 401 ? "This server asks for a key." : plain(error));
    if (error.status !== 401) setTimeout(() => turn === asked && open(), RETRY_MS);
  }
}

/** Shows the desk of a person; asks for a name where there is none that can be used. */
async function enter(name) {
  const id = memoryOf(name);
  const found = id ? await find(id) : undefined;
  const usable = Boolean(id) && !(found && whyUnusable(found, served));
  $("name-fault").textContent = name && !usable ? "This name can’t be used here. Choose another one." : "";
  $("welcome").hidden = usable;
  $("desk").hidden = !usable;
  if (!usable) return $("name").focus();
  [memory, exists, kept.person] = [id, Boolean(found), name];
  $("who").textContent = name;
  await finishChange(kept).catch(() => {});
  begin();
  await known.refresh();
  hint();
  message.focus();
}

function leave() {
  delete kept.person;
  [memory, exists] = ["", false];
  begin();
  $("name").value = "";
  enter("");
}

/** Makes the memory, if there is none; it keeps what is said as it was said, so that each message can be taken back. */
async function ensure() {
  const found = await find(memory);
  if (!found?.options.keep_text)
    await json(sessionPath(memory), { method: "PUT", body: { ...found?.options, keep_text: true } });
  exists = true;
}

// --- the conversation ---

function begin() {
  busy?.abort();
  busy = null;
  enable();
  turns = [];
  first = 0;
  $("messages").replaceChildren();
  hint();
}

/** What to do in a conversation that has not begun. */
function hint() {
  $("hint").hidden = turns.length > 0;
  const text = known.isEmpty
    ? "Tell me something about yourself. Then start a new conversation and ask for it: I will remember."
    : "Ask for something that you told me, or tell me something new.";
  if ($("hint-text").textContent !== text) $("hint-text").textContent = text;
  const fill = (example) => {
    message.value = example;
    message.focus();
  };
  const examples = known.isEmpty ? EXAMPLES : [];
  $("examples").replaceChildren(
    ...examples.map((one) => element("li", {}, action(one, () => fill(one), { className: "quiet" }))),
  );
}

function enable() {
  $("send").textContent = busy ? "Stop" : "Send";
  for (const turn of turns) turn.again.disabled = busy !== null;
}

function toEnd(force = false) {
  const page = document.documentElement;
  if (force || page.scrollHeight - innerHeight - scrollY < NEAR_END) scrollTo(0, page.scrollHeight);
}

/** The conversation before a turn, as much of it as comes with a question. */
function earlier(turn) {
  if (served[0].meta.n_params < SMALL) return [];
  const before = turns.slice(first, turns.indexOf(turn)).filter(({ said, answer }) => said && answer.trim());
  const said = [];
  let length = 0;
  for (const one of before.reverse()) {
    length += one.said.length + one.answer.length;
    if (length > EARLIER) break;
    said.unshift({ role: "user", content: one.said }, { role: "assistant", content: one.answer });
  }
  return said;
}

async function send(text) {
  const turn = new Turn(text, newKey(), { again: reply, copied: () => announce("Copied."), change: ask });
  turns.push(turn);
  $("messages").append(turn.place);
  hint();
  toEnd(true);
  await reply(turn);
}

/** Teaches what was said, once, and then answers: what was said is remembered, whatever becomes of the answer. */
async function reply(turn) {
  if (busy) return;
  const { signal } = (busy = new AbortController());
  const isOver = () => signal !== busy?.signal; // another conversation has begun
  let note = "";
  turn.begin();
  enable();
  announce("Answering.");
  try {
    if (turn.version === null) {
      await ensure();
      turn.version = (await teach(memory, turn.said, turn.key)).version;
      known.refresh().catch(failed);
    }
    for await (const event of events("v1/chat/completions", { body: question(turn), signal })) {
      turn.add(event.choices[0].delta.content ?? "");
      if (event.adaptation) turn.remember(event.adaptation.recalled);
      toEnd();
    }
    if (!turn.answer.trim()) note = "No answer came to mind.";
    announce(`Answer: ${turn.answer}`);
  } catch (error) {
    note = stopped(error) ? "Stopped." : plain(error);
    announce(note);
  }
  turn.end(note);
  if (isOver()) return;
  busy = null;
  enable();
  toEnd();
}

/** What was said is taught already, so that the answer teaches nothing. */
const question = (turn) => ({
  model: served[0].id,
  messages: [...earlier(turn), { role: "user", content: turn.said }],
  session: memory,
  adapt: "predict",
  max_tokens: LONGEST_ANSWER,
  ...served[0].sampling,
  stream: true,
});

// --- what is remembered ---

const failed = (error) => announce(plain(error));

/** Opens a dialog; "yes" runs work(), and the dialog stays open where it fails. Returns whether the work was done. */
function confirm(dialog, work) {
  const [form, fault] = [dialog.querySelector("form"), dialog.querySelector("[role=alert]")];
  let done = false;
  fault.textContent = "";
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (event.submitter?.value !== "yes") return dialog.close();
    form.inert = true;
    fault.textContent = "";
    await work().then(
      () => (done = true),
      (error) => (fault.textContent = `${plain(error)}${kept.change ? " This is done when you open the page again." : ""}`),
    );
    form.inert = false;
    if (done) dialog.close();
  };
  dialog.showModal();
  return new Promise((settle) => dialog.addEventListener("close", () => settle(done), { once: true }));
}

/** Asks how a message is to be corrected, or whether it is to be forgotten, and does so. */
async function ask(kind, { version, text, time }) {
  if (busy) return;
  try {
    const whole = await wholeMessage(memory, version);
    const corrected = kind === "correct" ? await askCorrection(version, whole, text.trim()) : "";
    const done = kind === "correct" ? corrected !== null : await askForget(version, whole, text.trim(), time);
    if (done) settle(version, corrected);
    else known.refresh().catch(failed); // another window may have changed it
  } catch (error) {
    failed(error);
  }
}

async function askCorrection(version, whole, text) {
  const field = $("correction");
  const before = (field.value = whole || text);
  const done = await confirm($("correct"), async () => {
    if (field.value.trim() !== before) await change(kept, memory, version, field.value.trim());
  });
  return done && field.value.trim() !== before ? field.value.trim() : null;
}

function askForget(version, whole, text, time) {
  const words = ["This erases for good all that you said in that message, which you sent ", moment(time), ":"];
  return forget("Forget this?", words, whole || text, () => change(kept, memory, version));
}

function forget(title, words, text, work) {
  const dialog = $("forget");
  $("forget-title").textContent = title;
  $("forget-text").replaceChildren(...words);
  dialog.querySelector("blockquote").textContent = text;
  dialog.querySelector("blockquote").hidden = !text;
  return confirm(dialog, work);
}

/** After a change, what was said before comes with no question any more: it may repeat what is gone. */
function settle(version, text) {
  for (const turn of turns) turn.settle(version, text);
  if (turns.length > first) {
    first = turns.length;
    const line = element("li", { className: "line" }, "What stands above is no longer used.");
    turns.at(-1).place.after(line);
  }
  announce(text ? "Corrected." : "Forgotten.");
  known.refresh().then(hint).catch(failed);
  message.focus();
}

async function forgetAll() {
  if (busy) return;
  const words = ["All that you ever told me is erased, for good. Nobody can bring it back."];
  const work = () => json(sessionPath(memory), { method: "DELETE" });
  if (!(await forget("Forget everything?", words, "", work))) return;
  exists = false;
  begin();
  announce("Everything is forgotten.");
  known.refresh().then(hint).catch(failed);
  message.focus();
}

const known = makeKnown({
  place: $("known"),
  memory: () => (exists ? memory : ""),
  change: ask,
  failed,
  shown: (any) => ($("forget-all").hidden = !any),
});

// --- what one can do ---

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  enter($("name").value.trim()).catch((error) => ($("name-fault").textContent = plain(error)));
});
$("leave").addEventListener("click", leave);
$("begin").addEventListener("click", () => {
  begin();
  announce("A new conversation.");
  message.focus();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (busy) return busy.abort();
  if (!text) return message.focus();
  message.value = "";
  send(text);
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy) $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy && !document.querySelector("dialog[open]")) busy.abort();
});
$("open-known").addEventListener("click", () => {
  const isOpen = document.body.classList.toggle("knows");
  $("open-known").setAttribute("aria-expanded", isOpen);
  $("open-known").textContent = isOpen ? "Back to the conversation" : "What I remember";
  if (isOpen) scrollTo(0, 0);
  else toEnd(true);
});
$("forget-all").addEventListener("click", forgetAll);

makeShell({ entered: open });
open();

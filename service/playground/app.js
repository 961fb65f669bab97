// The laboratory: a session is taught on the left, and what became of it is seen on the right.

import { makeCells, makeCurve, smoothed } from "./charts.js";
import { choices, compare, FROZEN } from "./compare.js";
import { makeDraft } from "./draft.js";
import { makeGuide } from "./guide.js";
import { difference, lineage, list, undoes } from "./history.js";
import { makeManuscript } from "./manuscript.js";
import { events, find, json, offered, sessionPath, sessions, stopped, whyUnusable } from "./server.js";
import { kept, makeShell } from "./shell.js";
import { count, nats, number, whole } from "./tokens.js";
import { pieces, Watch } from "./watch.js";

const RETRY_MS = 1000;
const PREVIEW = 4000; // characters that are shown of a text while it is learned
const POINTS = 24; // of the watched text's curve, at most, while one text is learned
const GHOST = 24; // tokens of a suggestion
const STATES = { loading: "The server is loading the model.", draining: "The server is shutting down." };

const $ = (id) => document.getElementById(id);
const [session, field] = [$("session"), $("draft")];
const curve = makeCurve($("curve"));
const drawCells = makeCells($("cells"));
const watch = new Watch();

let model = null; // its id, while the server is ready
let served = []; // the model, then the policies
let asked = 0;
let timer;
let busy = null; // what runs now, to be aborted
let meta = null; // of the session, if there is one
let log = new Map(); // its entries, by version
let passages = new Map(); // {text, parts or null}, by version
let pending = null; // a piece whose answer was not awaited: {session, text, key}
let view = "watched";

const say = (place, text, fault = false) => {
  place.textContent = text;
  place.classList.toggle("error", fault);
};
const note = document.querySelector("#teach .note");

// --- the session ---

function sessionIsValid() {
  const { valid, customError } = session.validity;
  session.setAttribute("aria-invalid", !valid);
  if (valid) $("session-fault").textContent = "";
  else if (customError) $("session-fault").textContent = session.validationMessage;
  else
    $("session-fault").textContent =
      "A session’s name has 1 to 128 letters, digits or . _ ~ : @ + = - and starts with a letter or a digit.";
  return valid;
}

/** Makes the session, if there is none of that name; one made here keeps its texts, so that they can be seen again. */
async function ensure(name) {
  if (meta?.id !== name)
    meta = (await find(name)) ?? (await json(sessionPath(name), { method: "PUT", body: { keep_text: true } }));
}

function showFacts() {
  const { version, tokens_learned, rows, bytes, gain } = meta ?? {
    version: session.validity.valid ? "new" : "–",
    tokens_learned: 0,
    rows: 0,
    bytes: 0,
    gain: null,
  };
  $("version").textContent = version;
  $("tokens-learned").textContent = number(tokens_learned);
  $("rows").textContent = number(rows);
  $("bytes").textContent = `${number(bytes / 1000, { maximumFractionDigits: 1 })} kB`;
  // What was learned first was predicted by an empty memory, so that it says nothing about the memory's worth.
  const unmeasured = tokens_learned ? "from the next text on" : "not measured";
  $("gain").textContent =
    gain === null ? unmeasured : number(gain, { maximumSignificantDigits: 3, signDisplay: "exceptZero" });
}

function enable() {
  for (const button of document.querySelectorAll("button:not(#guide-step)"))
    button.disabled = model === null || (busy !== null && !button.stops);
  session.readOnly = busy !== null;
  if (busy) return;
  $("undo").disabled ||= !meta || undoes(log, meta.version) === undefined;
  $("watch").disabled ||= !field.value.trim();
  for (const button of document.querySelectorAll("#fork button, #diff button")) button.disabled ||= !meta;
}

function announce(state) {
  if ($("state").textContent !== state) $("state").textContent = state;
  enable();
}

/** Asks until the server is ready, then shows the session as it is now. */
async function refresh() {
  clearTimeout(timer);
  const turn = ++asked;
  try {
    const models = await offered(STATES);
    if (turn !== asked) return;
    served = models;
    model = $("model").textContent = served[0].id;
    if (!$("temperature").value) $("temperature").value = served[0].sampling.temperature;
    $("door").hidden = true;
    announce("");
    await showSession(session.value, turn);
    if (turn === asked) draft.resume();
  } catch (error) {
    if (turn !== asked) return;
    model = null;
    const shut = error.status === 401;
    if (shut) $("door").hidden = false;
    announce(shut ? error.message : `${error.message} This page tries again by itself.`);
    if (!shut) timer = setTimeout(refresh, RETRY_MS);
  }
}

async function showSession(name, turn) {
  const everyone = await sessions();
  const named = !session.validity.patternMismatch && !session.validity.valueMissing;
  const stored = named ? await find(name) : undefined;
  const fault = stored ? whyUnusable(stored, served) : "";
  const found = fault ? undefined : stored;
  const told = found ? await json(sessionPath(name, "log?limit=1000")) : { data: [] };
  const seen = found ? await json(sessionPath(name, "cells")) : { sites: [] };
  if (turn !== asked) return;
  session.setCustomValidity(fault);
  sessionIsValid();
  const other = !meta || !found || meta.id !== found.id || meta.created !== found.created;
  meta = found;
  if (other) forget();
  log = new Map(told.data.map((entry) => [entry.version, entry]));
  for (const { version, text } of told.data)
    if (text && !passages.has(version)) passages.set(version, { text, parts: null });
  drawCells(seen.sites, other);
  showFacts();
  showManuscript();
  showVersions();
  showCurve();
  showNames(everyone);
  guide();
  enable();
  if (other && found) measure().catch(() => {});
}

/** What was seen of another session. */
function forget() {
  passages = new Map();
  watch.forget();
  log = new Map();
}

function showNames(everyone) {
  const names = everyone.filter((one) => !whyUnusable(one, served)).map((one) => one.id);
  $("sessions").replaceChildren(...names.map((name) => new Option(name)));
  choices($("left"), names, $("left").value && names.includes($("left").value) ? undefined : session.value);
  choices($("right"), names);
  const { value, dataset } = $("fork-name");
  if (value && value !== dataset.proposed) return; // somebody writes a name
  const taken = everyone.map((one) => one.id);
  $("fork-name").value = dataset.proposed = free(session.value, taken);
}

function free(name, everyone) {
  for (let i = 2; ; i++) if (!everyone.includes(`${name}-${i}`)) return `${name}-${i}`;
}

function showManuscript() {
  const present = meta ? lineage(log, meta.version) : [];
  const shown = manuscript.draw(
    present.filter((version) => passages.has(version)),
    passages,
    log,
  );
  const earlier = present.length - shown;
  $("earlier").hidden = earlier === 0;
  $("earlier").textContent = `${count(earlier, "earlier version")} not shown.`;
}

const show = (text) => {
  if ($("token").textContent !== text) $("token").textContent = text;
};

// --- the curve ---

async function measure(signal) {
  await watch.measure(session.value, signal);
  showCurve();
}

function showCurve() {
  if (view === "watched") {
    curve.draw(watch.data, { x: "version", points: true });
    $("curve-text").textContent = watch.told;
    return;
  }
  const parts = meta ? lineage(log, meta.version).flatMap((version) => passages.get(version)?.parts ?? []) : [];
  curve.draw(smoothed(parts), { x: "tokens learned", points: false });
  $("curve-text").textContent = parts.length
    ? "Each token as it was predicted before it was learned; means of 32."
    : "Shows each text that is learned while this page is open.";
}

// --- work that takes a while ---

/** Runs work(signal) alone; meanwhile `button` stops it. Faults are told in `place`. */
async function alone(button, place, work) {
  if (busy) return button.stops ? busy.abort() : undefined;
  if (!sessionIsValid()) return session.focus();
  const label = button.textContent;
  busy = new AbortController();
  button.textContent = "Stop";
  button.stops = true;
  say(place, "");
  draft.quiet();
  enable();
  try {
    await work(busy.signal);
  } catch (error) {
    say(place, `${stopped(error) ? "Stopped." : error.message} ${place.textContent}`.trim(), !stopped(error));
  }
  busy = null;
  button.textContent = label;
  button.stops = false;
  await refresh();
}

async function learn(signal) {
  const name = session.value;
  let rest = draft.take();
  const work = pieces(rest, pending?.session === name ? pending.text : "");
  const progress = $("learning").querySelector("progress");
  const job = crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
  const pause = Math.ceil(work.length / POINTS);
  const sum = { tokens: 0, adapted: 0, frozen: 0 };
  const show = () => {
    $("learning-text").textContent = rest.slice(0, PREVIEW);
  };
  try {
    show();
    Object.assign(progress, { max: work.length, value: 0 });
    $("learning").hidden = false;
    await ensure(name);
    if (!watch.text) watch.turn(rest, "the end of the first text learned here", { end: true });
    if (!watch.begun) await measure(signal);
    for (const [i, text] of work.entries()) {
      const scored = await commit(name, text, `page.${job}.${i}`, signal);
      rest = rest.slice(text.length);
      show();
      keep(text, scored, sum);
      progress.value = i + 1;
      say(
        note,
        `${name} learned ${count(sum.tokens, "token")}, ${number(i + 1)} of ${count(work.length, "piece")}; ` +
          `${surprise(sum)}; version ${scored.version}.`,
      );
      if (i % pause === 0 || i === work.length - 1) await measure(signal);
    }
  } finally {
    $("learning").hidden = true;
    draft.putBack(rest);
  }
}

/** How well tokens were predicted before they were learned. An empty memory predicts as the frozen base does. */
function surprise({ tokens, adapted, frozen }) {
  const [own, base] = [adapted, frozen].map((sum) => nats(Math.exp(sum / tokens)));
  if (adapted === frozen) return `perplexity ${base} before, as the memory was empty; the curve shows what it has learned`;
  return `perplexity ${own} before they were learned, ${base} for the frozen base`;
}

/** Learns a piece, once: one whose answer never came is asked for again under its old key. */
async function commit(name, text, id, signal) {
  const again = pending?.session === name && pending.text === text;
  pending = again ? pending : { session: name, text, key: crypto.randomUUID?.() ?? `${id}.${Date.now()}` };
  const headers = { "Idempotency-Key": pending.key, "X-Request-Id": id };
  const scored = await json(sessionPath(name, "score"), { body: { text, learn: true }, headers, signal });
  pending = null;
  return scored;
}

/** Adds a learned piece to the manuscript. */
function keep(text, scored, sum) {
  sum.tokens += scored.tokens.length;
  sum.adapted += scored.tokens.length * scored.loss;
  sum.frozen += scored.tokens.length * scored.frozen_loss;
  passages.set(scored.version, { text, parts: [...whole(text, scored)] });
  log.set(scored.version, {
    version: scored.version,
    kind: "learn",
    loss: scored.loss,
    tokens: scored.tokens.length,
    request_id: "",
  });
  meta = { ...meta, version: scored.version };
  $("version").textContent = scored.version;
  showManuscript();
  if (view === "read") showCurve();
  json(sessionPath(session.value, "cells"))
    .then(({ sites }) => drawCells(sites))
    .catch(() => {});
}

async function goBack(version, signal) {
  const before = meta && lineage(log, meta.version);
  const after = lineage(log, version);
  const texts = before.filter((one) => !after.includes(one)).map((one) => passages.get(one)?.text ?? "");
  const { version: now } = await json(sessionPath(session.value, "rollback"), { body: { version }, signal });
  if (!draft.text) draft.text = texts.join("");
  say($("versions-note"), `Version ${now} is what version ${version} was.`);
  await measure(signal);
}

const back = (version, button = $("undo")) =>
  alone(button, $("versions-note"), (signal) => goBack(version, signal)).then(() => draft.stale());

function showVersions() {
  const version = meta?.version ?? 0;
  $("versions").replaceChildren(...list(log, version, (to) => back(to)));
  for (const [select, wanted] of [
    [$("diff-from"), 0],
    [$("diff-to"), version],
  ]) {
    const before = Number(select.value);
    const keeps = select.children.length > 0 && select.id === "diff-from" && before <= version;
    const first = Math.max(0, version - 32);
    select.replaceChildren(...Array.from({ length: version - first + 1 }, (_, i) => new Option(first + i)));
    select.value = Math.max(first, keeps ? before : wanted);
  }
}

// --- what one can do ---

const manuscript = makeManuscript($("manuscript"), show);
const draft = makeDraft({
  field,
  backdrop: $("backdrop"),
  announce: $("suggestion"),
  ready: () => model !== null && !busy && session.validity.valid,
  suggests: () => $("suggest").checked,
  async *ask(prompt, signal) {
    await ensure(session.value);
    const body = {
      model,
      prompt,
      max_tokens: GHOST,
      ...served[0].sampling,
      temperature: 0,
      stop: ["\n\n"],
      stream: true,
      session: session.value,
      adapt: "predict",
    };
    for await (const event of events("v1/completions", { body, signal })) yield event.choices[0].text;
  },
  async score(text, signal) {
    await ensure(session.value);
    return json(sessionPath(session.value, "score"), { body: { text }, signal });
  },
  show,
  failed: (error) => say(note, error.message, true),
  changed() {
    guide();
    enable();
    $("learn").disabled ||= !busy && !field.value.trim();
  },
});
const guide = makeGuide({
  place: $("guide-text"),
  button: $("guide-step"),
  busy: () => busy !== null,
  learned: () => meta && lineage(log, meta.version).length > 0,
  draft,
  field,
  prompt: $("prompt"),
  watched(text, what) {
    watch.turn(text, what);
    showCurve();
  },
});

$("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  if (busy || draft.text.trim()) alone($("learn"), note, learn);
});
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !busy) $("teach").requestSubmit();
});
$("suggest").addEventListener("change", () => draft.look());
$("undo").addEventListener("click", () => back(undoes(log, meta.version)));
$("watch").addEventListener("click", () =>
  alone($("watch"), note, async (signal) => {
    await ensure(session.value);
    watch.turn(draft.text, "what was the draft");
    await measure(signal);
  }),
);
$("fork").addEventListener("submit", (event) => {
  event.preventDefault();
  const [from, to] = [session.value, $("fork-name").value];
  const button = event.target.querySelector("button");
  alone(button, $("versions-note"), async (signal) => {
    await json(sessionPath(from, "fork"), { body: { id: to }, signal });
    session.value = kept.session = to;
    choices($("left"), [from, to], to);
    choices($("right"), [from, to], from);
    if ($("fork-name").value === to) $("fork-name").value = "";
    say($("versions-note"), `${to} has learned what ${from} has; from here on they go their own ways.`);
  });
});
$("diff").addEventListener("submit", (event) => {
  event.preventDefault();
  const place = event.target.querySelector(".note");
  alone(event.target.querySelector("button"), place, async (signal) => {
    const span = `diff?from=${$("diff-from").value}&to=${$("diff-to").value}`;
    const [sentence, items] = difference(await json(sessionPath(session.value, span), { signal }));
    say(place, sentence);
    $("lessons").replaceChildren(...items);
  });
});
$("compare").addEventListener("submit", (event) => {
  event.preventDefault();
  const sides = ["left", "right"].map((side) => ({
    name: $(side).value,
    text: $(`${side}-text`),
    note: $(`${side}-note`),
  }));
  const request = {
    model,
    prompt: $("prompt").value,
    max_tokens: $("length").valueAsNumber,
    ...served[0].sampling,
    temperature: $("temperature").valueAsNumber,
  };
  const place = event.target.querySelector(".note");
  alone(event.target.querySelector("button"), place, (signal) => compare(sides, request, signal));
});
for (const radio of document.querySelectorAll("[name=view]"))
  radio.addEventListener("change", () => {
    view = radio.value;
    showCurve();
  });

session.addEventListener("input", () => {
  session.setCustomValidity("");
  sessionIsValid();
});
session.addEventListener("change", () => {
  if (!sessionIsValid()) return;
  kept.session = session.value;
  draft.quiet();
  say(note, "");
  refresh().then(() => draft.stale());
});

makeShell({ recoloured: curve.again, entered: refresh });
session.value = kept.session ?? session.value;
sessionIsValid();
guide();
refresh();

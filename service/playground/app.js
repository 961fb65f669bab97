// The page at /. What a model or a server says is put in as text, never as markup.

const PIECE = // of a long text: up to a blank line, else up to a line's end, a space or the limit
  /[^]{1,4000}(?:\n\s*\n|$)|[^]{1,4000}\n|[^]{1,4000}\s|[^]{1,4000}/gu;
const FULL_TINT = Math.log(20); // nats
const RETRY_MS = 1000;
const STATES = { loading: "The server is loading the model.", draining: "The server is shutting down." };

const $ = (id) => document.getElementById(id);
const number = (value, options) => value.toLocaleString("en", options);
const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
const nats = (value) => number(value, { minimumFractionDigits: 2, maximumFractionDigits: 2 });

// --- the server ---

const key = $("key");
let tab = {};
try { tab = sessionStorage; } catch { /* the browser forbids it: the key is forgotten with the page */ }
key.value = tab.apiKey ?? "";
key.addEventListener("change", () => {
  tab.apiKey = key.value = key.value.trim();
  refresh();
});

function broken(error) {
  throw error.name === "AbortError" ? error : new Error("The server does not answer.");
}

async function call(path, body, signal) {
  const headers = key.value ? { Authorization: `Bearer ${encodeURI(key.value)}` } : {};
  const post = { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch(path, body ? post : { headers }).catch(broken);
  if (response.ok) return response;
  if (response.status === 401) $("door").hidden = false;
  const fault = `The server answered ${response.status} ${response.statusText}.`;
  const message = await response.json().then((told) => told.error.message).catch(() => fault);
  throw Object.assign(new Error(message), { status: response.status });
}

const json = async (...request) => (await call(...request)).json();

/** The JSON of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch(broken);
    if (done) throw new Error("The server broke off its answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const data of parts.map((part) => part.slice("data: ".length))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- the session ---

const session = $("session");
let kept = {};
try { kept = localStorage; } catch { /* the browser forbids it: the name is forgotten with the page */ }
let model = null;
let asked = 0;
let timer;

const sessionPath = (name, action) => `v1/sessions/${encodeURIComponent(name)}/${action}`;

function sessionIsValid() {
  const { valid } = session.validity;
  session.setAttribute("aria-invalid", !valid);
  $("session-fault").textContent = valid ? "" :
    "A session’s name has 1 to 128 letters, digits or . _ ~ : @ + = - and starts with a letter or a digit.";
  return valid;
}

/** The session, or undefined; by way of the list, since browsers report a 404 for a new name as an error. */
async function find(name) {
  for (let after = name.slice(0, -1); after !== null;) {
    const page = await json(`v1/sessions?after=${encodeURIComponent(after)}`);
    const next = page.data.find((one) => one.id >= name);
    if (next) return next.id === name ? next : undefined;
    after = page.next;
  }
}

function showSession({ version, tokens_learned, rows, bytes, gain }) {
  $("version").textContent = version;
  $("tokens-learned").textContent = number(tokens_learned);
  $("rows").textContent = number(rows);
  $("bytes").textContent = `${number(bytes / 1000, { maximumFractionDigits: 1 })} kB`;
  $("gain").textContent = gain === null ? "not measured" : number(gain, { maximumFractionDigits: 3, signDisplay: "exceptZero" });
}

function announce(state) {
  if ($("state").textContent !== state) $("state").textContent = state;
  for (const button of document.querySelectorAll("button")) button.disabled = model === null;
}

/** Asks until the server is ready, then shows what it serves and the session as it is now. */
async function refresh() {
  clearTimeout(timer);
  const turn = ++asked;
  try {
    const { status } = await (await fetch("readyz").catch(broken)).json();
    if (status !== "ready") throw new Error(STATES[status]);
    const served = (await json("v1/models")).data[0].id;
    const found = session.validity.valid ? await find(session.value) : undefined;
    if (turn !== asked) return;
    model = $("model").textContent = served;
    showSession(found ?? { version: "new", tokens_learned: 0, rows: 0, bytes: 0, gain: null });
    $("door").hidden = true;
    announce("");
  } catch (error) {
    if (turn !== asked) return;
    model = null;
    const shut = error.status === 401;
    announce(shut ? error.message : `${error.message} This page tries again by itself.`);
    if (!shut) timer = setTimeout(refresh, RETRY_MS);
  }
}

// --- what one can do ---

/** Runs `work(name, say, signal)` when the form is sent; meanwhile its button stops it. */
function onSubmit(form, work) {
  const button = form.querySelector("button");
  const note = form.querySelector(".note");
  const label = button.textContent;
  const say = (text) => { note.textContent = text.trim(); };
  let running = null;
  const run = (controller) => {
    running = controller;
    button.textContent = running ? "Stop" : label;
    button.formNoValidate = running !== null;
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    if (!sessionIsValid()) return session.focus();
    run(new AbortController());
    note.classList.remove("error");
    say("");
    try {
      await work(session.value, say, running.signal);
    } catch (error) {
      const stopped = error.name === "AbortError";
      note.classList.toggle("error", !stopped);
      say(`${stopped ? "Stopped." : error.message} ${note.textContent}`);
    }
    running.abort(); // of two streams, the one that is left
    run(null);
    refresh();
  });
}

onSubmit($("teach"), async (name, say, signal) => {
  const lesson = $("lesson");
  const progress = $("teach").querySelector("progress");
  const pieces = lesson.value.match(PIECE);
  const sum = { tokens: 0, rows: 0, nats: 0 };
  progress.max = lesson.value.length;
  progress.value = 0;
  progress.hidden = pieces.length === 1;
  lesson.readOnly = true;
  try {
    for (const [index, text] of pieces.entries()) {
      const { tokens_learned, rows_written, loss, version } = await json(sessionPath(name, "observe"), { text }, signal);
      sum.tokens += tokens_learned;
      sum.rows += rows_written;
      sum.nats += tokens_learned * loss;
      lesson.value = lesson.value.slice(text.length);
      progress.value += text.length;
      say(`${name} learned ${count(sum.tokens, "token")} (${index + 1} of ${count(pieces.length, "piece")}) and wrote ` +
        `${count(sum.rows, "row")}; loss ${nats(sum.nats / sum.tokens)} nats per token; version ${version}.`);
    }
  } finally {
    progress.hidden = true;
    lesson.readOnly = false;
  }
});

/** Streams a completion into `place`; returns what the session's memory did. */
async function complete(place, request, signal) {
  const given = document.createElement("span");
  const said = document.createTextNode("");
  let adaptation = null;
  given.className = "given";
  given.textContent = request.prompt;
  place.replaceChildren(given, said);
  place.setAttribute("aria-busy", true);
  try {
    for await (const event of events(await call("v1/completions", request, signal))) {
      said.appendData(event.choices[0].text);
      adaptation = event.adaptation ?? adaptation;
    }
  } finally {
    place.setAttribute("aria-busy", false);
  }
  return adaptation;
}

onSubmit($("complete"), async (name, say, signal) => {
  const request = {
    model,
    prompt: $("prompt").value,
    max_tokens: $("length").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    seed: Math.floor(Math.random() * 2 ** 31), // the same for both, so that only the memory makes a difference
    stream: true,
  };
  const use = $("learn").checked ? { adapt: "both", learn: "prompt" } : { adapt: "predict" };
  const adapted = complete($("adapted"), { ...request, session: name, ...use }, signal).then((done) => {
    const learned = done.tokens_learned ? count(done.tokens_learned, "token") : "nothing";
    say(`${name} learned ${learned}; version ${done.version_to}.`);
  });
  await Promise.all([adapted, complete($("frozen"), request, signal)]);
});

/** The tokens as the text has them: those that share the bytes of a character become one. */
function* whole(text, { tokens, logprobs, frozen_logprobs }) {
  let at = 0;
  let open = null;
  for (const [i, token] of tokens.entries()) {
    const torn = token.includes("\ufffd") && !text.startsWith(token, at);
    if (open && torn) {
      open.adapted += logprobs[i];
      open.frozen += frozen_logprobs[i];
      continue;
    }
    if (open) {
      const end = Math.max(at, text.indexOf(token, at + 1));
      yield { ...open, text: text.slice(at, end) };
      at = end;
      open = null;
    }
    const part = { text: token, adapted: logprobs[i], frozen: frozen_logprobs[i] };
    if (torn) open = part;
    else yield part;
    if (text.startsWith(token, at)) at += token.length;
  }
  if (open) yield { ...open, text: text.slice(at) };
}

function chance(logprob) {
  const p = Math.exp(logprob);
  return p > 0.01 ? `${(100 * p).toPrecision(3)} %` : `1 in ${number(1 / p, { notation: "compact" })}`;
}

function showToken({ text, adapted, frozen }, index) {
  const token = document.createElement("span");
  token.textContent = text;
  token.title = `${JSON.stringify(text)}: ${chance(adapted)} with the memory, ${chance(frozen)} for the frozen base`;
  token.className = adapted < frozen ? "worse" : "better";
  token.style.setProperty("--strength", Math.min(Math.abs(adapted - frozen) / FULL_TINT, 1));
  token.tabIndex = index ? -1 : 0;
  return token;
}

onSubmit($("score"), async (name, say, signal) => {
  const text = $("sample").value;
  const scored = await json(sessionPath(name, "score"), { text }, signal);
  const { tokens, loss, frozen_loss } = scored;
  $("tokens").replaceChildren(...[...whole(text, scored)].map(showToken));
  $("scored").hidden = false;
  say(`Perplexity ${nats(Math.exp(loss))} with the memory of ${name}, ${nats(Math.exp(frozen_loss))} for the frozen base, ` +
    `over ${count(tokens.length, "token")}.`);
});

$("tokens").addEventListener("focusin", ({ target }) => {
  for (const token of $("tokens").querySelectorAll("[tabindex='0']")) token.tabIndex = -1;
  target.tabIndex = 0;
  $("token").textContent = target.title;
});
$("tokens").addEventListener("keydown", ({ key, target }) => {
  const next = { ArrowLeft: target.previousSibling, ArrowRight: target.nextSibling }[key];
  next?.focus();
});
session.addEventListener("input", sessionIsValid);
session.addEventListener("change", () => {
  if (!sessionIsValid()) return;
  kept.session = session.value;
  refresh();
});
session.value = kept.session ?? session.value;
sessionIsValid();
refresh();

// Talking with the server. What it says is put in the page as text, never as markup.

export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const visit = crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
let apiKey = "";
let asked = 0;
export const useKey = (key) => {
  apiKey = key;
};
export const sessionPath = (name, action = "") => `v1/sessions/${encodeURIComponent(name)}${action && `/${action}`}`;
export const stopped = (error) => error.name === "AbortError";

function broken(error) {
  throw stopped(error) ? error : new Error("The server does not answer.");
}

function unreadable(error) {
  throw stopped(error) ? error : new Error("Something answered that is not the server; a proxy may be in between.");
}

/** The answer to a request; throws `Refused` with the server's own words for one that is none. */
export async function call(path, { body, method = body ? "POST" : "GET", headers = {}, signal } = {}) {
  // An error may tell under which id the server's log has the request: one that a person can read out.
  const given = { "X-Request-Id": `page-${visit}-${++asked}`, ...headers };
  if (apiKey) given.Authorization = `Bearer ${encodeURI(apiKey)}`;
  if (body) given["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers: given, body: body && JSON.stringify(body), signal }).catch(
    broken,
  );
  if (response.ok) return response;
  const fault = { message: `The server answered ${response.status} ${response.statusText}.` };
  const { message, code } = await response
    .json()
    .then((told) => told.error)
    .catch(() => fault);
  throw new Refused(message, response.status, code);
}

export const json = async (path, options) => (await call(path, options)).json().catch(unreadable);

/** What /readyz says, whatever its status. */
const readiness = async () => (await (await fetch("readyz").catch(broken)).json().catch(unreadable)).status;

/** The models and policies that are served; throws, while the server serves none, what `states` say of its state. */
export async function offered(states) {
  const status = await readiness();
  if (status !== "ready") throw new Error(states[status]);
  return [...(await json("v1/models")).data, ...(await json("v1/policies")).data];
}

/** The JSON of each server-sent event of a streamed answer. */
export async function* events(path, options) {
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch(broken);
    if (done) throw new Error("The server broke off its answer; try again.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const data of parts.map((part) => part.slice("data: ".length))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, 500, event.error.code);
      yield event;
    }
  }
}

/** The first sessions, in the order of their ids. */
export const sessions = async () => (await json("v1/sessions?limit=1000")).data;

/** The session, or undefined; by way of the list, since browsers report a 404 for a new name as an error. */
export async function find(name) {
  for (let after = name.slice(0, -1); after !== null;) {
    const page = await json(`v1/sessions?after=${encodeURIComponent(after)}`);
    const next = page.data.find((one) => one.id >= name);
    if (next) return next.id === name ? next : undefined;
    after = page.next;
  }
}

/** Why the model of text cannot read a session, as a sentence; "" if it can. models: the model of text, then policies. */
export function whyUnusable({ id, model }, [text, ...policies]) {
  if (model === text.fingerprints.session) return "";
  const policy = policies.find(({ fingerprints }) => fingerprints.policy === model);
  const whose = policy ? `the policy ${policy.id}, which writes no text` : "other slow weights than the server has now";
  return `${id} is a session of ${whose}. Choose another name.`;
}

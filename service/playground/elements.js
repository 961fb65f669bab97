// Small helpers for what the page shows: elements, and when something was said.

const MINUTE = 60_000;
const DAY = 86_400_000;

/** A new element with properties and children; texts become text, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that does no more than call work(event). */
export function action(label, work, properties = {}) {
  const button = element("button", { type: "button", className: "link", ...properties }, label);
  button.addEventListener("click", work);
  return button;
}

const midnight = (date) => new Date(date.getFullYear(), date.getMonth(), date.getDate());

/** When something was, as a person would say it: "on Tuesday". */
export function when(date, now = new Date()) {
  const days = Math.round((midnight(now) - midnight(date)) / DAY);
  const time = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (now - date < 2 * MINUTE) return "just now";
  if (days < 1) return `today at ${time}`;
  if (days === 1) return `yesterday at ${time}`;
  if (days < 7) return `on ${date.toLocaleDateString("en-GB", { weekday: "long" })}`;
  const year = date.getFullYear() === now.getFullYear() ? undefined : "numeric";
  return `on ${date.toLocaleDateString("en-GB", { day: "numeric", month: "long", year })}`;
}

/** The same as an element, which shows the whole date under the pointer. seconds: unix time; null is long ago. */
export function moment(seconds) {
  if (seconds === null) return "a long time ago";
  const date = new Date(seconds * 1000);
  return element("time", { dateTime: date.toISOString(), title: date.toLocaleString("en-GB") }, when(date));
}

// Tokens and how they are shown: tinted and underlined by how much better or worse the memory predicts them.

const FULL = Math.log(20); // nats of difference at which the tint is full
const SEEN = Math.log(1.25); // below which a token counts as predicted alike

export const number = (value, options) => value.toLocaleString("en", options);
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
export const nats = (value) => number(value, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function chance(logprob) {
  const p = Math.exp(logprob);
  return p > 0.01 ? `${(100 * p).toPrecision(3)} %` : `1 in ${number(1 / p, { notation: "compact" })}`;
}

/** Both probabilities of a token, in words. */
export function describe({ text, adapted, frozen }) {
  const ratio = Math.exp(Math.abs(adapted - frozen));
  const times = number(ratio, { maximumSignificantDigits: 2, notation: ratio < 1e4 ? "standard" : "compact" });
  const verdict =
    Math.abs(adapted - frozen) < SEEN
      ? "much the same"
      : `${times} times ${adapted > frozen ? "likelier" : "less likely"}`;
  return `${JSON.stringify(text)}: ${chance(adapted)} with the memory, ${chance(frozen)} for the frozen base; ${verdict}`;
}

/** The tokens as the text has them: those that share the bytes of a character become one. */
export function* whole(text, { tokens, logprobs, frozen_logprobs }) {
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

/** A tinted span; its `told` is the token. */
export function span(part) {
  const token = document.createElement("span");
  const gain = part.adapted - part.frozen;
  token.told = part;
  token.textContent = part.text;
  if (Math.abs(gain) >= SEEN) {
    token.className = gain > 0 ? "better" : "worse";
    token.style.setProperty("--strength", Math.min(Math.abs(gain) / FULL, 1).toFixed(3));
  }
  return token;
}

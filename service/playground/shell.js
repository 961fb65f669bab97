// What all faces of the page share: what the browser keeps, the colours, and the door of a server with keys.

import { useKey } from "./server.js";

const storage = (name) => {
  try {
    return window[name];
  } catch {
    return {}; /* forbidden: forgotten with the page */
  }
};
export const kept = storage("localStorage");
const tab = storage("sessionStorage");

/** Calls recoloured() when the colours are others, and entered() when a key was entered. slot: where the tab keeps it. */
export function makeShell({ recoloured = () => {}, entered, slot = "apiKey" }) {
  const [theme, door, key] = ["theme", "door", "key"].map((id) => document.getElementById(id));
  const recolour = () => {
    document.documentElement.dataset.theme = theme.value;
    recoloured();
  };
  theme.addEventListener("change", () => {
    kept.theme = theme.value;
    recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recoloured);
  door.addEventListener("submit", (event) => {
    event.preventDefault();
    key.blur();
  });
  key.addEventListener("change", () => {
    tab[slot] = key.value = key.value.trim();
    useKey(key.value);
    entered();
  });
  theme.value = kept.theme ?? "";
  recolour();
  useKey((key.value = tab[slot] ?? ""));
}

// The page's phrases in the reader's language, as the server put them into the page.
const words = JSON.parse(document.getElementById("words").textContent);

/** One phrase with its {values} filled in. */
export function say(key, values = {}) {
  return words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

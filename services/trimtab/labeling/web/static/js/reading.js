// Long answers fold and unfold; each can be shown as it was written, too.
import { say } from "./words.js";

const SLACK_PX = 80; // an answer that is hardly longer than the fold is shown whole

export class Reading {
  constructor(element) {
    this.text = element;
    this.rendered = element.querySelector(".rendered");
    this.raw = element.querySelector(".raw");
    this.tools = document.createElement("div");
    this.tools.className = "text-tools";
    this.foldButton = this.#button(() => this.toggleFold());
    this.rawButton = this.#button(() => this.toggleRaw());
    this.rawButton.textContent = say("raw");
    element.after(this.tools);
    element.classList.add("folded");
    this.foldable = element.scrollHeight > element.clientHeight + SLACK_PX;
    this.#fold(this.foldable);
    this.foldButton.hidden = !this.foldable;
    this.rawButton.hidden = this.rendered.textContent.trim() === this.raw.textContent.trim() && !this.foldable;
    // Something inside that gets the focus (a link, a scrolling piece of code) must be seen.
    element.addEventListener("focusin", () => this.foldable && this.#fold(false));
  }

  toggleFold() {
    if (this.foldable) this.#fold(!this.text.classList.contains("folded"));
  }

  toggleRaw() {
    this.raw.hidden = !this.raw.hidden;
    this.rendered.hidden = !this.raw.hidden;
    this.rawButton.textContent = say(this.raw.hidden ? "raw" : "words");
  }

  #fold(folded) {
    this.text.classList.toggle("folded", folded);
    this.foldButton.textContent = say(folded ? "unfold" : "fold");
    this.foldButton.setAttribute("aria-expanded", String(!folded));
  }

  #button(act) {
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", act);
    this.tools.append(button);
    return button;
  }
}

/** All answers of the page by letter. */
export function readings() {
  const all = [...document.querySelectorAll(".answer")];
  return new Map(all.map((answer) => [answer.dataset.letter, new Reading(answer.querySelector("[data-foldable]"))]));
}

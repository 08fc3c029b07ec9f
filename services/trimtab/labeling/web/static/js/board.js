// The board: one lane a rank, one chip an answer. It shows a Ranking and says where chips are dropped.
import { say } from "./words.js";
import { startDrag } from "./drag.js";

export class Board {
  /** element: #board; ranking: what to show; on: {drop(letter, target), choose(letter)}. */
  constructor(element, ranking, on) {
    this.element = element;
    this.ranking = ranking;
    this.on = on;
    this.chips = new Map(ranking.letters.map((letter, i) => [letter, this.#chip(letter, i)]));
    this.lanes = [...element.querySelectorAll("[data-slot]")];
    element.hidden = false;
  }

  /** Put each chip into its lane; `moved` is the letter that just changed, if any. */
  show(moved = null) {
    for (const lane of this.lanes) {
      const rank = Number(lane.dataset.slot) || null;
      const letters = this.ranking.on(rank);
      const chips = lane.querySelector(".chips");
      const wanted = letters.map((letter) => this.chips.get(letter));
      if (wanted.some((chip, i) => chips.children[i] !== chip) || chips.children.length !== wanted.length) {
        const focused = document.activeElement;
        chips.replaceChildren(...wanted);
        if (wanted.includes(focused)) focused.focus({ preventScroll: true });
      }
      lane.classList.toggle("filled", letters.length > 0 && rank !== null);
      lane.classList.toggle("emptied", letters.length === 0 && rank === null);
    }
    for (const [letter, chip] of this.chips) {
      const rank = this.ranking.rankOf(letter);
      chip.setAttribute("aria-label", say(rank ? "chip" : "chip_unranked", { letter, rank }));
      chip.classList.toggle("landed", letter === moved);
    }
  }

  choose(letter) {
    for (const [one, chip] of this.chips) chip.classList.toggle("chosen", one === letter);
  }

  /** Let an element outside of the board (an answer's letter) be dragged into it. */
  draggable(handle, letter) {
    handle.addEventListener("pointerdown", (event) => this.#drag(event, letter));
  }

  #chip(letter, index) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = `chip hue-${index + 1}`;
    chip.dataset.letter = letter;
    const name = document.createElement("b");
    name.textContent = letter;
    const words = document.createElement("span");
    const text = document.querySelector(`#answer-${letter} .raw`).textContent.trim();
    words.textContent = text.replace(/\s+/g, " ").slice(0, 80);
    chip.append(name, words);
    chip.addEventListener("pointerdown", (event) => this.#drag(event, letter));
    chip.addEventListener("click", () => this.on.choose(letter));
    return chip;
  }

  #drag(event, letter) {
    startDrag(event, {
      ghost: () => this.chips.get(letter).cloneNode(true),
      targets: [...this.element.querySelectorAll("[data-slot], [data-gap]")],
      moving: this.chips.get(letter),
      drop: (target) => this.on.drop(letter, target.dataset),
    });
  }
}

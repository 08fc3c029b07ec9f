// The ranking page: keys, radio buttons, chips and drags all change one Ranking; everything is shown from it.
import { Board } from "./board.js";
import { Ranking } from "./ranking.js";
import { readings } from "./reading.js";
import { TaskForm, isForControl } from "./task.js";
import { say } from "./words.js";

const answers = [...document.querySelectorAll(".answer")];
const letters = answers.map((answer) => answer.dataset.letter);
const texts = readings();
const announcer = document.getElementById("announcer");
const undoButton = document.getElementById("undo");
const task = new TaskForm(isReady);
const form = task.form;
const ranking = new Ranking(letters, ranksOfForm());
const board = new Board(document.getElementById("board"), ranking, {
  choose: (letter) => choose(letter, true),
  drop: (letter, to) =>
    change(letter, () =>
      to.gap ? ranking.insertBefore(letter, Number(to.gap)) : ranking.place(letter, Number(to.slot) || null),
    ),
});
let chosen = letters[0];

function ranksOfForm() {
  const ranks = {};
  for (const letter of letters) {
    const rank = Number(form.elements[`rank_${letter}`].value);
    if (rank) ranks[letter] = rank;
  }
  return ranks;
}

function isReady() {
  if (ranking.missing) {
    choose(ranking.on(null)[0], true);
    showCount(true);
    return false;
  }
  const unrated = letters.find((letter) => !form.elements[`rating_${letter}`]?.value);
  if (form.dataset.requireRatings === "yes" && unrated) {
    choose(unrated, true);
    task.show(say("rate_all"), true);
    return false;
  }
  return true;
}

function show(moved = null) {
  for (const letter of letters) {
    const rank = ranking.rankOf(letter);
    for (const radio of form.elements[`rank_${letter}`]) radio.checked = Number(radio.value) === rank;
    const tied = ranking.tiedWith(letter);
    document.querySelector(`[data-tie="${letter}"]`).textContent = tied.length
      ? say("tied_with", { letters: tied.join(" ") })
      : "";
  }
  board.show(moved);
  undoButton.disabled = ranking.history.length === 0;
  showFlagCounts();
}

function showCount(urgent = false) {
  task.show(ranking.missing ? say("missing", { count: ranking.missing }) : say("all_ranked"), urgent);
}

function showFlagCounts() {
  for (const letter of letters) {
    const flags = form.querySelectorAll(`[name="flags_${letter}"]:checked`).length;
    const note = form.elements[`note_${letter}`].value.trim() ? 1 : 0;
    document.querySelector(`[data-flag-count="${letter}"]`).textContent = flags + note || "";
  }
}

function change(letter, apply) {
  if (!apply()) {
    show();
    return false;
  }
  choose(letter, false);
  show(letter);
  showCount();
  task.draft.later();
  announce(letter);
  return true;
}

function announce(letter) {
  const rank = ranking.rankOf(letter);
  const tied = ranking.tiedWith(letter).join(", ");
  if (rank) announcer.textContent = say(tied ? "said_tied" : "said_rank", { letter, rank, letters: tied });
}

function choose(letter, focus) {
  chosen = letter;
  for (const answer of answers) answer.classList.toggle("chosen", answer.dataset.letter === letter);
  board.choose(letter);
  if (!focus) return;
  const answer = document.getElementById(`answer-${letter}`);
  answer.focus({ preventScroll: true });
  answer.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
}

function calm() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function step(by) {
  const at = letters.indexOf(chosen) + by;
  if (at >= 0 && at < letters.length) choose(letters[at], true);
}

/** Rank the chosen answer; the next one without a rank is chosen then, so that reading goes on. */
function rankChosen(rank) {
  if (rank > letters.length) return;
  change(chosen, () => ranking.place(chosen, rank));
  const from = letters.indexOf(chosen);
  const next = [...letters.slice(from + 1), ...letters.slice(0, from)].find((l) => ranking.rankOf(l) === null);
  if (next) choose(next, true);
}

function rateChosen(rating) {
  const radios = form.elements[`rating_${chosen}`];
  if (!radios || rating > 7) return;
  const [letter, before] = [chosen, radios.value];
  if (before === String(rating)) return;
  ranking.remember(() => setRating(letter, before));
  setRating(letter, String(rating));
  undoButton.disabled = false;
  task.draft.later();
  announcer.textContent = say("said_rating", { letter, rating });
}

function setRating(letter, value) {
  for (const radio of form.elements[`rating_${letter}`]) radio.checked = radio.value === value;
}

function undo() {
  if (!ranking.undo()) return;
  show();
  showCount();
  task.draft.later();
  announcer.textContent = say("undone");
}

function toggleMarks() {
  const marks = document.querySelector(`#answer-${chosen} .marks`);
  marks.open = !marks.open;
  if (marks.open) marks.querySelector("input, textarea").focus();
  else choose(chosen, true);
}

const KEYS = {
  ArrowUp: (event) => (event.shiftKey ? change(chosen, () => ranking.move(chosen, -1)) : step(-1)),
  ArrowDown: (event) => (event.shiftKey ? change(chosen, () => ranking.move(chosen, +1)) : step(+1)),
  ArrowLeft: () => change(chosen, () => ranking.move(chosen, -1)),
  ArrowRight: () => change(chosen, () => ranking.move(chosen, +1)),
  t: () => change(chosen, () => ranking.toggleTie(chosen)),
  u: undo,
  s: () => task.skip(),
  f: toggleMarks,
  o: () => texts.get(chosen).toggleFold(),
  m: () => texts.get(chosen).toggleRaw(),
  Enter: () => task.submit(),
  "?": () => document.getElementById("keys-dialog").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target.closest(".marks-sheet")) toggleMarks();
  if (isForControl(event)) return;
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
  const act = digit
    ? () => (event.shiftKey ? rateChosen(Number(digit[1])) : rankChosen(Number(digit[1])))
    : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act(event);
});

form.addEventListener("change", ({ target }) => {
  const rank = /^rank_(\w)$/.exec(target.name);
  if (rank) change(rank[1], () => ranking.place(rank[1], Number(target.value)));
  else showFlagCounts();
});
for (const answer of answers) {
  const letter = answer.dataset.letter;
  answer.addEventListener("focusin", () => chosen !== letter && choose(letter, false));
  answer.addEventListener("click", () => chosen !== letter && choose(letter, false));
  board.draggable(answer.querySelector("[data-drag]"), letter);
}
undoButton.addEventListener("click", undo);
document.getElementById("keys").addEventListener("click", KEYS["?"]);

show();
choose(chosen, false);
if (!task.restored) showCount();

// The comparison page: 1 or ←, 2 or →, T, then Enter.
import { readings } from "./reading.js";
import { TaskForm, isForControl } from "./task.js";

readings();
const task = new TaskForm(() => task.form.elements.preference.value !== "" || choose(null));

/** Tick a choice; null puts the focus on the choices, since one is missing. */
function choose(value) {
  const radios = [...task.form.elements.preference];
  const radio = radios.find((one) => one.value === value);
  if (radio) radio.checked = true;
  (radio ?? radios[0]).focus();
  task.draft.later();
  return false;
}

const KEYS = {
  1: () => choose("a"),
  a: () => choose("a"),
  ArrowLeft: () => choose("a"),
  2: () => choose("b"),
  b: () => choose("b"),
  ArrowRight: () => choose("b"),
  t: () => choose("tie"),
  s: () => task.skip(),
  Enter: () => task.submit(),
};

document.addEventListener("keydown", (event) => {
  if (isForControl(event)) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

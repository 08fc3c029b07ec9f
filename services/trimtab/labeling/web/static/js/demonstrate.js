// The writing page: Ctrl (or ⌘) + Enter submits.
import { TaskForm } from "./task.js";
import { say } from "./words.js";

const counter = document.getElementById("counter");
const task = new TaskForm(() => task.form.elements.answer.value.trim() !== "" || refuse());
const answer = task.form.elements.answer;

function refuse() {
  answer.focus();
  return false;
}

function count() {
  counter.textContent = say("characters", { count: [...answer.value].length });
}

answer.addEventListener("input", count);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) task.submit();
});
count();

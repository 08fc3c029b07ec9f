// What ranking, comparing and writing share: the draft, the clock, the lease, submitting, skipping.
import { Draft } from "./drafts.js";
import { keepLease, send, timeInto } from "./send.js";
import { say } from "./words.js";

export class TaskForm {
  /** ready() says whether the form may be sent, and shows what is missing where it may not. */
  constructor(ready = () => true) {
    this.form = document.getElementById("task");
    this.form.noValidate = true;
    this.ready = ready;
    this.sending = false;
    this.status = document.getElementById("status");
    this.draft = new Draft(this.form);
    this.restored = this.draft.restore();
    this.stampTime = timeInto(this.form.elements.seconds);
    this.skipDialog = document.getElementById("skip-dialog");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    document.getElementById("skip")?.addEventListener("click", () => this.skip());
    document.getElementById("skip-form").addEventListener("submit", () => this.draft.forget());
    if (this.form.dataset.edit === "no") {
      keepLease(this.form.dataset.task, this.form.elements.csrf.value, () => this.show(say("lost"), true));
    }
    if (this.restored) this.show(say("restored"), false);
  }

  show(text, urgent = false) {
    this.status.textContent = text;
    this.status.classList.toggle("urgent", urgent);
  }

  async submit() {
    if (this.sending || !this.ready()) return;
    this.sending = true;
    this.stampTime();
    this.draft.save();
    try {
      await send(this.form, (text, urgent) => this.show(text, urgent), () => this.draft.forget());
    } finally {
      this.sending = false;
    }
  }

  skip() {
    if (document.getElementById("skip")) this.skipDialog.showModal();
  }
}

/** Whether a key belongs to what has the focus (a text, a dialog, a control of its own) and not to the page. */
export function isForControl(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return true;
  const target = event.target;
  if (document.querySelector("dialog[open]")) return true;
  if (target.matches("textarea, select, input:not([type=radio], [type=checkbox])")) return true;
  const acts = target.matches("button, a, summary") && ["Enter", " "].includes(event.key);
  const radio = target.matches("input[type=radio]") && event.key.startsWith("Arrow");
  return acts || radio;
}

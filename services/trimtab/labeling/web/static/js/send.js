// Submitting: sent until the server has acknowledged it, with the same key each time; then on to the next page.
import { say } from "./words.js";

const LONGEST_WAIT_MS = 15000;

/** form: the task's form; show(text, urgent) tells the labeler; done() is called once it is saved. */
export async function send(form, show, done) {
  const body = new URLSearchParams(new FormData(form));
  show(say("saving"), false);
  for (let wait = 500; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
    const answer = await post(form.getAttribute("action"), body);
    if (answer?.ok) {
      done();
      location.assign((await answer.json()).next);
      return true;
    }
    if (answer && answer.status < 500) {
      show(await reason(answer), true);
      return false;
    }
    show(say("retrying"), true);
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

/** The time that the page was in view, in seconds, as a field of the form. */
export function timeInto(field) {
  let seconds = 0;
  let since = document.hidden ? null : performance.now();
  const stop = () => {
    if (since !== null) seconds += (performance.now() - since) / 1000;
    since = null;
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stop();
    else since = performance.now();
  });
  return () => {
    stop();
    since = performance.now();
    field.value = seconds.toFixed(1);
  };
}

/** Keep the task while somebody works on it; lost() where others have taken it meanwhile. */
export function keepLease(task, csrf, lost) {
  let active = true;
  for (const kind of ["keydown", "pointerdown", "scroll"]) {
    addEventListener(kind, () => (active = true), { passive: true });
  }
  setInterval(async () => {
    if (!active || document.hidden) return;
    active = false;
    const headers = { accept: "application/json", "x-csrf-token": csrf };
    const answer = await fetch(`/api/v1/tasks/${task}/lease`, { method: "POST", headers }).catch(() => null);
    if (answer?.status === 409) lost();
  }, 60000);
}

async function post(action, body) {
  const headers = { accept: "application/json", "content-type": "application/x-www-form-urlencoded" };
  try {
    return await fetch(action, { method: "POST", headers, body: body.toString(), redirect: "manual" });
  } catch {
    return null;
  }
}

async function reason(answer) {
  if (answer.status === 401 || answer.type === "opaqueredirect") return say("signed_out");
  const problem = await answer.json().catch(() => null);
  return say("refused", { reason: problem?.error?.message ?? answer.status });
}

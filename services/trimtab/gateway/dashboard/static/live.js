// The events of a run for as long as the page is open, each step once. Whatever is away (network, gateway, trainer), it
// asks again for what comes after the last step that it has seen.

const AGAIN_MS = 1000;
const AGAIN_AFTER_TROUBLE_MS = 5000;
const UNNOTICED_MS = 2500; // the gateway ends each stream after some seconds: a way back that is this short goes without a word
const SILENT_MS = 40000; // and this is twice as long as a stream lasts: nothing comes through any more

// Calls `onStatus`, `onStep` and `onTrouble` with the data of each event, `onLink` with false once the run's events have
// stopped to come and with true when they come again.
export function follow(search, { onStatus, onStep, onTrouble, onLink }) {
  let source;
  let last = 0;
  let again, silent, lost;
  let pause = AGAIN_MS;

  const open = () => {
    const query = new URLSearchParams(search);
    query.set("after", last);
    source = new EventSource(`/dashboard/events?${query}`);
    let answered = false;
    const hear = (name, act) => source.addEventListener(name, (event) => {
      wait();
      act(JSON.parse(event.data));
    });
    hear("status", (status) => {
      clearTimeout(lost);
      lost = null;
      pause = AGAIN_MS;
      onLink(true);
      onStatus(status);
    });
    hear("step", (data) => {
      if (data.step <= last) return;
      last = data.step;
      onStep(data);
    });
    hear("trouble", (trouble) => {
      pause = AGAIN_AFTER_TROUBLE_MS;
      onTrouble(trouble);
    });
    source.addEventListener("open", () => { answered = true; });
    source.addEventListener("error", () => reopen(answered));
    wait();
  };

  const wait = () => {
    clearTimeout(silent);
    silent = setTimeout(() => reopen(true), SILENT_MS);
  };

  const reopen = (answered) => {
    source.close();
    clearTimeout(silent);
    clearTimeout(again);
    lost ??= setTimeout(() => onLink(false), UNNOTICED_MS);
    again = setTimeout(open, pause);
    if (!answered) goWhereSignedOut();
  };

  open();
}

// A refusal cannot be told from a gateway that is away by the events; the page's own address tells.
async function goWhereSignedOut() {
  try {
    const page = await fetch("/dashboard", { headers: { accept: "text/html" }, redirect: "manual" });
    if (page.type === "opaqueredirect") location.assign("/dashboard/sign-in");
  } catch {
    // The gateway is away: asked again soon.
  }
}

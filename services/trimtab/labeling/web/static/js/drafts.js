// Unfinished work survives a closed tab, a dead battery and a server that is away: it is kept in this browser until the
// server has acknowledged it. The submission's key is kept with it, so that sending again after a crash is harmless.

const PREFIX = "trimtab-draft-";
const LONGEST_MS = 7 * 24 * 3600 * 1000;

export class Draft {
  /** form: the task's form; its address names the draft, a lead's decision apart from an own ranking. */
  constructor(form) {
    this.form = form;
    this.name = PREFIX + form.getAttribute("action") + (form.elements.adjudicate?.value ? "!" : "");
    this.timer = null;
    form.addEventListener("input", () => this.later());
    addEventListener("pagehide", () => this.timer && this.save());
    forgetOld();
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), 300);
  }

  save() {
    clearTimeout(this.timer);
    this.timer = null;
    const fields = [...new FormData(this.form)].filter(([name]) => name !== "csrf");
    write(this.name, JSON.stringify({ at: Date.now(), fields }));
  }

  /** Put the fields of an earlier draft back; false where there is none. */
  restore() {
    const kept = read(this.name);
    if (!kept) return false;
    const values = new Map();
    for (const [name, value] of kept.fields) values.set(name, [...(values.get(name) ?? []), value]);
    for (const field of this.form.elements) {
      if (!field.name || field.name === "csrf") continue;
      const given = values.get(field.name) ?? [];
      if (field.type === "radio" || field.type === "checkbox") field.checked = given.includes(field.value);
      else if (given.length) field.value = given[0];
    }
    return true;
  }

  forget() {
    clearTimeout(this.timer);
    this.timer = null;
    try {
      localStorage.removeItem(this.name);
    } catch {
      // A browser that keeps nothing has nothing to forget.
    }
  }
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Private windows and full disks: the page works without drafts.
  }
}

function forgetOld() {
  try {
    for (const name of Object.keys(localStorage)) {
      if (name.startsWith(PREFIX) && Date.now() - (read(name)?.at ?? 0) > LONGEST_MS) localStorage.removeItem(name);
    }
  } catch {
    // As above.
  }
}

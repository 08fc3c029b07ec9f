// What the pages do: live charts, colours of tokens, answers asked for, roll back, signing in and out.

import { follow } from "./live.js";

const CHARTS = [
  ["Reward", ["normalized_score_mean", "score_mean", "gold_score_mean", "pair_accuracy", "validation_pair_accuracy"]],
  ["KL against the reference, nats a response", ["kl_nats_per_sequence", "kl_exact_nats_per_sequence"]],
  ["Loss", ["loss", "validation_loss", "loss_policy", "loss_value", "loss_ptx"]],
  ["Clip fraction", ["clip_fraction_policy", "clip_fraction_value"]],
  ["Explained variance", ["explained_variance"]],
  ["Entropy, nats a token", ["entropy_mean"]],
  ["Response length, tokens", ["response_length_mean"]],
  ["Throughput, tokens a second", ["tokens_per_second_generate", "tokens_per_second_train"]],
  ["Waiting, share of the step", ["generate", "score", "reference", "values", "train", "publish"].map((name) => `wait_share_${name}`)],
  ["Gradient norm", ["grad_norm_policy", "grad_norm_value"]],
  ["Learning rate", ["learning_rate"]],
];
const COLOURS = ["--one", "--two", "--three", "--four", "--five", "--six"];
const byId = (id) => document.getElementById(id);
const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (name) => name.replace(/_mean$/, "").replace(/^(wait_share|tokens_per_second|loss|clip_fraction|grad_norm)_/, "").replaceAll("_", " ");
const figure = (value) => {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size > 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
};

async function send(path, body, method = "POST") {
  const response = await fetch(path, { method, headers: { "content-type": "application/json" }, body: body && JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

function showTrouble(text) {
  byId("trouble").hidden = !text;
  byId("trouble").textContent = text;
}

class Chart {
  constructor(parent, title, names) {
    this.names = names;
    this.box = document.createElement("section");
    this.box.className = "card chart";
    const heading = document.createElement("h2");
    heading.textContent = title;
    this.keys = document.createElement("ul");
    this.keys.className = "keys";
    this.plot = document.createElement("div");
    this.plot.setAttribute("role", "img");
    this.box.append(heading, this.keys, this.plot);
    parent.append(this.box);
    new ResizeObserver(() => this.drawn?.setSize(this.size())).observe(this.plot);
  }

  size() {
    return { width: Math.max(200, this.plot.clientWidth), height: 170 };
  }

  draw(steps, rows) {
    const names = this.names.filter((name) => rows.some((row) => name in row));
    this.box.hidden = names.length === 0;
    if (this.box.hidden) return;
    Object.assign(this, { steps, rows });
    const data = [steps, ...names.map((name) => rows.map((row) => row[name] ?? null))];
    const look = names.join() + styled("--one");
    if (this.look !== look) this.make(names, look, data);
    else this.drawn.setData(data);
    this.tell(names, rows.length - 1);
  }

  make(names, look, data) {
    this.look = look;
    this.drawn?.destroy();
    const axis = { stroke: styled("--muted"), grid: { stroke: styled("--line"), width: 1 }, ticks: { stroke: styled("--line"), width: 1 } };
    const options = {
      ...this.size(),
      legend: { show: false },
      scales: { x: { time: false, range: (_, from, to) => (from === to ? [from - 1, to + 1] : [from, to]) } },
      axes: [{ ...axis, size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 58, values: (_, ticks) => ticks.map(figure) }],
      series: [{}, ...names.map((name, place) => ({ label: name, stroke: styled(COLOURS[place]), width: 2, spanGaps: true, points: { show: (plot) => plot.data[0].length < 12, size: 5 } }))],
      hooks: { setCursor: [(plot) => this.tell(names, plot.cursor.idx ?? this.rows.length - 1)] },
    };
    this.drawn = new uPlot(options, data, this.plot);
  }

  tell(names, place) {
    const row = this.rows[place] ?? {};
    this.keys.replaceChildren(...names.map((name, index) => {
      const key = document.createElement("li");
      key.className = `c${index + 1}`;
      key.title = name;
      const value = document.createElement("b");
      value.textContent = figure(row[name]);
      key.append(document.createElement("i"), `${short(name)} `, value);
      return key;
    }));
    const span = `${this.steps.length} points, steps ${this.steps[0]} to ${this.steps.at(-1)}`;
    const values = names.map((name) => `${name} ${figure(row[name])}`).join(", ");
    this.plot.setAttribute("aria-label", `${span}; at step ${this.steps[place]}: ${values}`);
  }
}

function charts() {
  const all = CHARTS.map(([title, names]) => new Chart(byId("charts"), title, names));
  const steps = [];
  const rows = [];
  let due = false;
  const draw = () => {
    due = false;
    all.forEach((chart) => chart.draw(steps, rows));
  };
  const soon = () => {
    if (!due) requestAnimationFrame(draw);
    due = true;
  };
  all.forEach((chart) => { chart.box.hidden = true; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
  let run = null;
  const onStatus = (status) => {
    if (run !== null && status.run_id !== run) location.reload();
    run = status.run_id;
    showTrouble(status.error);
    byId("run").textContent = status.run_id;
    byId("state").hidden = false;
    byId("state").textContent = `${status.stage} · ${status.state}`;
    byId("state").classList.toggle("open", status.state === "running");
    byId("activity").textContent = status.activity;
    byId("steps").textContent = `step ${status.step} of ${status.total_steps || "?"} · ${status.published} versions`;
    byId("progress").hidden = !status.total_steps;
    byId("progress").value = status.total_steps ? status.step / status.total_steps : 0;
  };
  const onStep = ({ step, values }) => {
    steps.push(step);
    rows.push(values);
    if (values.seconds_step) byId("speed").textContent = `${figure(values.seconds_step)} s a step`;
    soon();
  };
  const onLink = (up) => {
    byId("link").hidden = up;
    if (!up) byId("state").classList.remove("open");
  };
  follow(location.search, { onStatus, onStep, onTrouble: ({ message }) => showTrouble(message), onLink });
}

function samples() {
  const colour = () => document.querySelector("[name=colour]:checked").value;
  const paint = () => { document.body.classList.remove("by-kl", "by-value"); document.body.classList.add(`by-${colour()}`); };
  document.querySelectorAll("[name=colour]").forEach((choice) => choice.addEventListener("change", paint));
  paint();
  byId("samples").addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".t");
    if (token) byId("token").textContent = `KL ${token.dataset.kl} nats, value ${token.dataset.value}`;
  });
  byId("samples").addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-prompt]");
    if (!button) return;
    button.disabled = true;
    const shown = document.createElement("p");
    shown.className = "answer";
    const from = document.createElement("p");
    from.className = "row-facts";
    try {
      const { text, version } = await send("/dashboard/answer", { prompt: button.dataset.prompt });
      shown.textContent = text;
      from.textContent = `served now: ${version}`;
    } catch (error) {
      from.textContent = error.message;
    }
    button.replaceWith(shown, from);
  });
}

function versions() {
  const dialog = byId("sure");
  let asked = null;
  document.querySelectorAll(".roll-back").forEach((button) => button.addEventListener("click", () => {
    asked = { run_id: button.dataset.run, name: button.dataset.name, step: Number(button.dataset.step) };
    byId("sure-title").textContent = `Make ${asked.run_id}/${asked.name}@${asked.step} current?`;
    dialog.returnValue = "";
    dialog.showModal();
  }));
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue !== "yes") return;
    try {
      await send("/dashboard/roll-back", asked);
      location.reload();
    } catch (error) {
      byId("moved").hidden = false;
      byId("moved").classList.add("wrong");
      byId("moved").textContent = error.message;
    }
  });
}

function signIn() {
  byId("sign-in").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await send("/dashboard/session", { token: new FormData(event.target).get("token").trim() });
      location.assign("/dashboard");
    } catch (error) {
      byId("refused").hidden = false;
      byId("refused").textContent = error.message;
    }
  });
}

byId("sign-out")?.addEventListener("click", async () => {
  await send("/dashboard/session", null, "DELETE");
  location.assign("/dashboard/sign-in");
});
({ charts, samples, versions, sign_in: signIn })[document.body.dataset.page]?.();

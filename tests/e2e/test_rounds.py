"""`trimtab rounds` and `trimtab compare` as a user runs them: a miniature always, two real rounds as a long proof."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.rounds.journal import Journal
from trimtab.rounds.status import read_status
from trimtab.weights.store import open_store

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "models" / "stories260K-hf"
TRIMTAB = (sys.executable, "-m", "trimtab")
STAGES = [
    "0/sft",
    "0/evaluate",
    "0/publish",
    *(f"1/{s}" for s in ["sample", "rank", "reward", "ppo", "evaluate", "publish"]),
]
MARGIN = 0.1  # by which a second round may fall behind the first; runs with other seeds spread by half of it


def trimtab(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIMTAB, *arguments], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def done_stages(folder: Path) -> list[str]:
    return [event.stage for event in Journal(folder).events if event.event == "done"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe of one small round, run to its reward model; (recipe, folder)."""
    home = tmp_path_factory.mktemp("rounds")
    prompts = [f"One day, a {who} named {name} " for who in ("girl", "boy", "dog", "cat") for name in ("Lily", "Tim")]
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    stories = [
        f"{text}went to the park. The {i} trees were green. It was a good day." for i, text in enumerate(prompts)
    ]
    (home / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    recipe = {
        "name": "mini",
        "model": str(MODEL),
        "rounds": 1,
        "sft": {"data": "stories.jsonl", "batch_size": 8, "epochs": 1, "max_length": 128},
        "sample": {"prompts": "prompts.jsonl", "sets": 8, "k": 4},
        "rank": {"source": "simulated", "gold": "words:he,she,was", "noise": 0.3, "held_out": 0.2},
        "reward": {"batch_prompts": 4, "optimizer": {"learning_rate": 1e-3}},
        "ppo": {
            "prompts": "prompts.jsonl",
            "steps": 4,
            "batch_size": 8,
            "minibatch_size": 8,
            "max_new_tokens": 12,
            "min_new_tokens": 12,
        },
        "evaluate": {"prompts": "prompts.jsonl", "judge": "words:he,she,was,the", "samples": 2, "checkpoints": 2},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeeded(run_rounds(home / "recipe.yaml", home / "run", "--until", "1/reward"))
    assert done_stages(home / "run") == STAGES[:6]
    shutil.copytree(home / "run", home / "run-to-kill")
    return home / "recipe.yaml", home / "run"


def run_rounds(recipe: Path, folder: Path, *more: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return trimtab("rounds", "run", str(recipe), "--folder", str(folder), *more, timeout_s=timeout_s)


@pytest.mark.timeout(400)
def test_a_miniature_round_goes_through_all_stages_and_publishes_the_best_policy(miniature):
    recipe, folder = miniature
    output = succeeded(run_rounds(recipe, folder))
    assert "report.md" in output
    journal = Journal(folder)
    assert done_stages(folder) == STAGES and all(journal.attempts(stage) == 1 for stage in STAGES)
    store = open_store(str(folder / "store"))
    best = store.current("mini", "policy")
    wins = {0: 0.5, 1: journal.done("1/evaluate").metrics["judge_win_rate"]}
    assert best.version.step == max(wins, key=wins.get)
    AutoModelForCausalLM.from_pretrained(store.fetch(store.get("mini", "policy", 1)))
    AutoModelForSequenceClassification.from_pretrained(store.fetch(store.get("mini", "reward", 1)))
    ppo = journal.done("1/ppo")
    assert ppo.inputs["reference"] == ppo.inputs["start"] == journal.done("0/sft").outputs["policy"]
    points = json.loads((folder / "rounds" / "001" / "evaluation" / "evaluation.json").read_text())["points"]
    assert [point["version"].partition(" ")[0] for point in points] == ["mini-r1-ppo/policy@2", "mini-r1-ppo/policy@4"]
    assert all(set(point["wins"]) == {"judge", "gold", "reward"} for point in points)
    assert (folder / "rounds.png").stat().st_size > 10_000
    assert "simulated labeler" in (folder / "report.md").read_text()
    labelers = {json.loads(row)["labeler"] for row in (folder / "rankings" / "train" / "round-001.jsonl").open()}
    assert labelers == {"simulated-1"}

    status = trimtab("rounds", "status", str(folder), "--json")
    assert json.loads(succeeded(status))["state"] == "finished"
    events = len(journal.events)
    succeeded(run_rounds(recipe, folder))
    assert len(Journal(folder).events) == events, "a finished run does nothing"
    changed = run_rounds(recipe, folder, "--set", "ppo.kl_coefficient=0.5")
    assert changed.returncode == 1 and len(changed.stderr.splitlines()) == 1
    assert "ppo.kl_coefficient was None when this run was begun and is 0.5 now" in changed.stderr


@pytest.mark.timeout(400)
def test_compare_says_which_of_two_versions_a_judge_prefers(miniature, tmp_path):
    recipe, folder = miniature
    sides = [str(MODEL), "version:mini-r0-sft/policy"]
    shared = ["--prompts", str(recipe.parent / "prompts.jsonl"), "--store", str(folder / "store"), "--max-tokens", "12"]
    output = succeeded(trimtab("compare", *sides, *shared, "--judge", "words:the,a", "--out", str(tmp_path)))
    assert "B's answer is preferred in" in output and "mini-r0-sft/policy@1" in output
    numbers = json.loads((tmp_path / "duel.json").read_text())
    assert numbers["win_rate"]["low"] <= numbers["win_rate"]["value"] <= numbers["win_rate"]["high"]
    assert (tmp_path / "duel.png").stat().st_size > 10_000
    assert (tmp_path / "report.md").read_text().count("> *B* (") == 8


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [*TRIMTAB, "rounds", "run", str(recipe), "--folder", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], condition, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_killed_inside_ppo_and_between_stages_it_goes_on_where_it_was(miniature):
    recipe, _ = miniature
    folder = recipe.parent / "run-to-kill"
    before = Journal(folder).events
    metrics = folder / "runs" / "mini-r1-ppo" / "metrics.jsonl"
    kill_when(start(recipe, folder), metrics.exists)
    status = {stage.name: stage.state for stage in read_status(folder).stages}
    assert status["1/reward"] == "done" and status["1/ppo"] == "cut off" and status["1/publish"] == "to do"
    assert read_status(folder).state == "stopped"

    kill_when(start(recipe, folder), lambda: "1/ppo" in done_stages(folder))
    succeeded(run_rounds(recipe, folder))
    journal = Journal(folder)
    assert journal.events[: len(before)] == before, "what was acknowledged stays as it was"
    assert done_stages(folder) == STAGES
    assert [journal.attempts(f"1/{stage}") for stage in ("reward", "ppo", "publish")] == [1, 2, 1]
    assert journal.done("1/ppo").outputs["run"] == "mini-r1-ppo-attempt2"
    lineage = open_store(str(folder / "store")).get("mini", "policy", 1).lineage
    assert lineage["from"].startswith("mini-r1-ppo-attempt2/policy@")


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the trainer's process in /proc")
def test_a_trainer_that_dies_inside_ppo_costs_an_attempt_and_not_the_run(miniature, tmp_path):
    recipe, _ = miniature
    folder = tmp_path / "run"
    process = start(recipe, folder)
    deadline = time.monotonic() + 300
    while not (folder / "runs" / "mini-r1-ppo" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    config = str(folder / "services" / "trainer.yaml").encode()
    (trainer,) = (path for path in Path("/proc").glob("[0-9]*/cmdline") if config in path.read_bytes().split(b"\0"))
    os.kill(int(trainer.parent.name), signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    journal = Journal(folder)
    assert done_stages(folder) == STAGES and journal.attempts("1/ppo") == 2
    assert any(event.event == "failed" and "the trainer was gone" in event.detail for event in journal.events)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_again_and_again_at_any_moment_it_still_ends(miniature, tmp_path):
    recipe, _ = miniature
    folder, chance = tmp_path / "run", random.Random(4)
    for life_s in [chance.uniform(1, 14 + 4 * i) for i in range(8)]:
        process = start(recipe, folder)
        time.sleep(life_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        acknowledged = done_stages(folder) if (folder / "journal.jsonl").exists() else []
        assert acknowledged == STAGES[: len(acknowledged)]
    succeeded(run_rounds(recipe, folder))
    assert done_stages(folder) == STAGES


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_first_round_beats_sft_and_the_second_does_not_fall_behind(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    subprocess.run([sys.executable, str(EXAMPLES / "data" / "prepare.py"), str(data)], check=True, capture_output=True)
    paths = {
        "sft.data": "sft/train.jsonl",
        "sft.validation_data": "sft/validation.jsonl",
        "sample.prompts": "ppo/openings.jsonl",
        "ppo.prompts": "ppo/openings.jsonl",
        "evaluate.prompts": "evaluation/openings.jsonl",
    }
    settings = [text for key, name in paths.items() for text in ("--set", f"{key}={data / name}")]
    recipe = EXAMPLES / "rounds" / "stories.yaml"
    succeeded(run_rounds(recipe, folder, "--set", "rounds=2", *settings, timeout_s=3500))
    journal = Journal(folder)
    first, second = (journal.done(f"{number}/evaluate").metrics for number in (1, 2))
    assert first["judge_win_rate_low"] > 0.5, first
    assert first["gold_win_rate"] > 0.6, first
    assert second["judge_win_rate_low"] > 0.5, second
    assert second["gold_win_rate"] > first["gold_win_rate"] - MARGIN, (first, second)
    assert second["win_rate_against_previous"] > 0.5 - MARGIN, second
    assert (folder / "rounds.png").stat().st_size > 10_000

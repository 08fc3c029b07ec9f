"""`trimtab demo` as a user runs it: a miniature always, the whole with its promises among the long proofs."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.rounds.launchers.services import free_ports
from trimtab.weights.store import open_store
from trimtab_client import LabelingClient, Unavailable

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 40


def run_demo(folder: Path, examples: Path, timeout_s: float) -> str:
    command = [sys.executable, "-m", "trimtab", "demo", "--folder", str(folder), "--examples", str(examples)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def small_examples(tmp_path) -> Path:
    """The examples with some forty rows of each set and a few steps of each stage."""
    examples = tmp_path / "examples"
    shutil.copytree(EXAMPLES, examples)
    for name, changes in {
        "sft": {"batch_size": 16},
        "reward": {"batch_prompts": 10},
        "ppo": {"steps": 2, "batch_size": 16, "minibatch_size": 8, "max_new_tokens": 12, "min_new_tokens": 12},
    }.items():
        path = examples / "demo" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    whole = examples / "data" / "prepare.py"
    whole.rename(examples / "data" / "prepare_all.py")
    whole.write_text(
        "import sys, runpy\nfrom pathlib import Path\n"
        "runpy.run_path(str(Path(__file__).with_name('prepare_all.py')), run_name='__main__')\n"
        "for path in Path(sys.argv[1]).rglob('*.jsonl'):\n"
        "    lines = path.read_text().splitlines(True)\n"
        f"    path.write_text(''.join(lines[:: max(1, len(lines) // {ROWS})]))\n"
    )
    return examples


@pytest.mark.timeout(420)
def test_a_miniature_demo_goes_through_all_stages_and_ends_with_a_report(small_examples, tmp_path):
    folder = tmp_path / "demo"
    output = run_demo(folder, small_examples, timeout_s=400)
    assert "report.md" in output and "checkpoints" in output
    assert f"trimtab label --demo {folder}" in output
    report = json.loads((folder / "report" / "report.json").read_text())
    assert [version["version"] for version in report["versions"]][-1] == "demo-ppo/policy@2"
    for plot in ("curves.png", "judge.png", "reward_model.png"):
        assert (folder / "report" / plot).stat().st_size > 10_000
    store = open_store(str(folder / "store"))
    AutoModelForCausalLM.from_pretrained(store.fetch(store.current("demo-ppo", "policy")))
    AutoModelForSequenceClassification.from_pretrained(store.fetch(store.current("demo-reward", "reward")))
    metrics = (folder / "runs" / "demo-ppo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["approx_kl_first_minibatch"] == 0
    people_can_rank_the_demos_policy(folder)


def people_can_rank_the_demos_policy(folder: Path) -> None:
    """`trimtab label`, which the demo names at its end: its link signs in, and answers of the policy wait there."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "trimtab", "label", "--demo", str(folder), "--port", str(port), "--prompts", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        link = next(line.strip() for line in process.stdout if "/sign-in#name=you&token=" in line)
        client = LabelingClient(f"http://127.0.0.1:{port}", link.partition("&token=")[2])
        deadline = time.monotonic() + 60
        while not (state := _progress(client)) or state["filling"]:
            assert time.monotonic() < deadline, state
            time.sleep(0.3)
        assert state["waiting"] == 2
    finally:
        process.terminate()
        process.wait(timeout=60)


def _progress(client: LabelingClient) -> dict[str, int]:
    with suppress(Unavailable):
        return client.progress("try")
    return {}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_keeps_every_promise(tmp_path):
    run_demo(tmp_path / "demo", EXAMPLES, timeout_s=2900)
    report = json.loads((tmp_path / "demo" / "report" / "report.json").read_text())
    assert report["bars"] and all(bar["held"] for bar in report["bars"]), report["bars"]

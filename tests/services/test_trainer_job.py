"""`trimtab job` on a real trainer process: it ends with its run, hands back what a Job's policy reads, and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from trimtab.rounds.launchers.process import port_is_free
from trimtab.rounds.launchers.services import free_ports
from trimtab.weights.store import open_store

MODEL = Path(__file__).parents[2] / "examples/models/stories260K-hf"


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": "Once", "response": f" upon a time there was a cat number {i}."} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    port, health = free_ports(2)
    settings = {"port": port, "health_port": health, "metrics_port": None, "threads": 1, "log_format": "json"}
    settings |= {"store": str(tmp_path / "store"), "folder": str(tmp_path / "runs")}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def start(folder, *, epochs=1, **config):
    stage = {"model": str(MODEL), "max_length": 64, "checkpoint_every_steps": 1}
    values = {"stage": stage, "data": str(folder / "rows.jsonl"), "epochs": epochs, "batch_size": 8} | config
    (folder / "run.yaml").write_text(yaml.safe_dump({"run_id": "r1", "stage": "sft", "config": values}))
    command = [sys.executable, "-m", "trimtab", "job", "--config", str(folder / "trainer.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([*command, "--run", str(folder / "run.yaml")], stdout=log, stderr=log, env=environment)


def steps(folder):
    records = [json.loads(line) for line in (folder / "log").read_text().splitlines() if line.startswith("{")]
    return [record["step"] for record in records if record.get("event") == "step"]


@pytest.mark.slow
def test_a_job_ends_with_its_run_and_again_is_harmless(folder):
    assert start(folder).wait(120) == 0
    (version,) = open_store(str(folder / "store")).versions("r1", "policy")
    assert version.version.step == 8
    assert start(folder).wait(120) == 0
    assert len(open_store(str(folder / "store")).versions("r1", "policy")) == 1


@pytest.mark.slow
def test_wrong_settings_are_42_and_a_failed_run_is_1(folder):
    assert start(folder, batch_size=0).wait(60) == 42
    assert start(folder, batches=3).wait(60) == 42
    assert start(folder, data=str(folder / "nothing.jsonl")).wait(120) == 1
    assert "no such file" in (folder / "log").read_text()


@pytest.mark.slow
def test_a_job_that_is_evicted_says_so_and_the_next_one_goes_on(folder):
    first = start(folder, epochs=40)
    deadline = time.monotonic() + 120
    while len(steps(folder)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    reached = max(steps(folder))
    (folder / "log").write_text("")
    second = start(folder, epochs=40)
    deadline = time.monotonic() + 120
    while not steps(folder):
        assert second.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.1)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 143
    assert reached < 320
    log = (folder / "log").read_text()
    assert min(steps(folder)) >= reached - 1 or f'"step": {reached}' in log


@pytest.mark.slow
def test_kill_9_of_a_job_takes_its_trainer_along_and_the_next_one_goes_on(folder):
    first = start(folder)
    deadline = time.monotonic() + 120
    while len(steps(folder)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.02)
    first.kill()
    first.wait()
    port = yaml.safe_load((folder / "trainer.yaml").read_text())["port"]
    deadline = time.monotonic() + 5
    while not port_is_free(f"127.0.0.1:{port}"):
        assert time.monotonic() < deadline, "the trainer outlives its job"
        time.sleep(0.05)
    assert start(folder).wait(120) == 0
    assert steps(folder)[-1] == 8

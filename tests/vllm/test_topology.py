"""The whole topology once: two ranks, two generator replicas of either engine, two reward replicas, S3, deltas, kills.

One generator replica and one rank are killed in mid-step.
"""

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf import json_format

from tests.e2e.rank_jobs import TORCHRUN, Job
from tests.e2e.test_kill import processes_of, sentences, write_rows
from tests.s3_server import s3_environment, s3_server
from tests.vllm.room import START_S, save_policy, save_reward, settings_of
from trimtab.models.policy import Policy
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.process import ProcessStatus, RestartPolicy
from trimtab.rounds.launchers.services import free_ports, service_process
from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.store import Store, open_store
from trimtab_client import TrainerClient, TrimtabError
from trimtab_client.v1 import trainer_pb2

RUN, STEPS, EPISODES = "whole", 6, 8
LONGEST_S = 600.0
LOCAL, VLLM, REWARDS = "generator-local", "generator-vllm", ("reward-0", "reward-1")


@dataclass
class Services:
    """What the trainer calls, each a process of its own under one supervisor."""

    folder: Path
    store: str
    supervisor: Supervisor
    addresses: dict[str, str] = field(default_factory=dict)
    metrics_ports: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, name: str, settings: dict[str, object]) -> None:
        (port,) = free_ports(1)
        values = settings | {"store": self.store, "metrics_port": port}
        values.pop("port", None)
        spec = service_process(kind, values, self.folder / "services", name=name)
        self.addresses[name], self.metrics_ports[name] = spec.address, port
        self.supervisor.add(spec)

    def status(self, name: str) -> ProcessStatus:
        return next(status for status in self.supervisor.statuses() if status.name == name)

    def sequences(self, name: str) -> int:
        """How many sequences the process that now bears this name has computed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_ports[name]}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("trimtab_sequences_total")))


@contextmanager
def served(folder: Path, store: str, policy: Path, reward: Path) -> Iterator[Services]:
    patient = RestartPolicy(attempts=100, first_s=0.05, longest_s=0.05)
    with Supervisor(policy=patient) as supervisor:
        services = Services(folder, store, supervisor)
        services.add("generator", VLLM, settings_of(policy))
        services.add("generator", LOCAL, {"model": str(policy)})
        for name in REWARDS:
            services.add("reward", name, {"model": str(reward)})
        services.add("reference", "reference", {"model": str(policy)})
        supervisor.wait_ready(timeout_s=START_S)
        yield services


def ppo_values(services: Services, policy: Path, reward: Path) -> dict:
    rows = [{"prompt": text} for text in sentences(24, 0)]
    config = trainer_pb2.PpoConfig(
        prompts=str(write_rows(services.folder / "prompts.jsonl", rows)),
        value_model=str(reward),
        generator_address=f"{services.addresses[VLLM]},{services.addresses[LOCAL]}",
        reward_address=",".join(services.addresses[name] for name in REWARDS),
        reference_address=services.addresses["reference"],
        steps=STEPS,
        batch_size=EPISODES,
        minibatch_size=4,
        inner_epochs=2,
        max_new_tokens=250,
        kl_coefficient=0.05,
        service_timeout_s=LONGEST_S,
    )
    config.stage.model = str(policy)
    config.stage.compute_dtype = "bfloat16"
    config.stage.micro_batch_tokens = 1024
    config.stage.optimizer.learning_rate = 5e-6
    config.stage.checkpoint_every_steps = 5  # the killed rank comes back to its journal
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def wait_until_generating(job: Job, after_step: int) -> int:
    """Return while completions are being sampled, with the step that ended before, `after_step` or a later one."""
    until_s = time.monotonic() + LONGEST_S
    with TrainerClient(job.address) as client:
        while time.monotonic() < until_s:
            assert job.process.poll() is None, (job.folder / "log").read_text()[-5000:]
            try:
                status = client.status(RUN)
            except TrimtabError:  # its port is not open yet, or the run not started
                time.sleep(0.2)
                continue
            assert not status.finished, f"it ended before step {after_step}: {status}"
            if status.step >= after_step and status.activity.startswith("generating"):
                return status.step
            time.sleep(0.005)
    raise AssertionError("nothing is generated")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """On a real S3 server, whose address is in the environment of whatever starts from here."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("topology")
        yield open_store("s3://topology/store")


def test_the_whole_topology_outlives_a_killed_replica_and_a_killed_rank(store: Store, tmp_path: Path) -> None:
    policy, reward = save_policy(tmp_path / "policy", 1), save_reward(tmp_path / "reward", 2)
    with served(tmp_path, store.url, policy, reward) as services:
        values = ppo_values(services, policy, reward)
        job = Job(tmp_path, RUN, "ppo", values, torchrun=TORCHRUN, store=store.url, keep_versions=20)
        try:
            step = wait_until_generating(job, 2)
            victim = services.status(LOCAL).pid
            assert victim is not None and services.sequences(LOCAL) > 0
            os.kill(victim, signal.SIGKILL)
            assert len(job.rows()) == step, "it was killed in the middle of a step"
            step = wait_until_generating(job, step + 1)
            before = {file: job.rows(file) for file in ("metrics.jsonl", "samples.jsonl")}
            job.kill_rank_after(1, step)
            assert job.process.wait(LONGEST_S) == 0, (tmp_path / "log").read_text()[-5000:]
        finally:
            if job.process.poll() is None:
                job.process.terminate()
                job.process.wait(60)
        services.supervisor.wait_ready(timeout_s=START_S)
        restarts = {name: services.status(name).restarts for name in services.addresses}
        assert restarts == dict.fromkeys(services.addresses, 0) | {LOCAL: 1}
        assert services.sequences(VLLM) > 0 and all(services.sequences(name) > 0 for name in REWARDS)

    assert [row["step"] for row in job.rows()] == list(range(1, STEPS + 1))
    steps_of_samples = [row["step"] for row in job.rows("samples.jsonl")]
    assert steps_of_samples == [step for step in range(1, STEPS + 1) for _ in range(EPISODES)]
    for file, rows in before.items():
        assert job.rows(file)[: len(rows)] == rows, "what was reported before the rank was killed stays"
    assert (tmp_path / "log").read_text().count("following") >= 2, "torchrun started the ranks again"
    check_versions(store, tmp_path)
    assert processes_of(tmp_path) == []


def check_versions(store: Store, folder: Path) -> None:
    """Every version is there, whole, and most are deltas; the last one is a model."""
    versions = store.versions(RUN, "policy")
    assert [manifest.version.step for manifest in versions] == list(range(STEPS + 1))
    assert [manifest.kind for manifest in versions] == ["full"] + ["delta"] * STEPS
    for manifest in versions:
        assert store.verify(manifest) == manifest
    assert store.current(RUN, "policy") == versions[-1]
    assert DELTA_FILE in {entry.name for entry in versions[-1].files}
    assert Policy.load(str(store.fetch(versions[-1]))).parameter_count > 0
    assert versions[-1].version.digest != versions[0].version.digest

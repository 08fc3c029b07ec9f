"""A real PPO run behind a real gateway with keys, for the dashboard's tests and pictures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml

from tests.services.gateway.judged_comparison import judged_comparison
from tests.services.test_commands import ENV, MODEL, TRIMTAB, trimtab, wait_for
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.rounds.launchers.services import free_ports
from trimtab_client import TrainerClient
from trimtab_client.v1 import trainer_pb2

RUN = "kind-stories"
PROMPTS = ["Once upon a time", "One day", "Tom had a ball.", "Lily saw a big dog", "The sun was", "A little bird"]


@dataclass(frozen=True)
class Room:
    """`url` is the gateway's; `tokens` by name: watcher (train), root (train, generate, admin)."""

    url: str
    trainer: str
    store: Path
    tokens: dict[str, str]

    def cookies(self, name: str) -> list[dict[str, str]]:
        """Playwright's cookies of somebody who has signed in."""
        cookie = {"name": "trimtab_dashboard", "value": self.tokens[name], "url": f"{self.url}/dashboard"}
        return [cookie]


@contextmanager
def open_room(folder: Path, steps: int) -> Iterator[Room]:
    """All services and a run of `steps` PPO steps on the small story model, done."""
    ScalarModel.from_policy(Policy.load(str(MODEL)), seed=0).save(folder / "reward")
    tokens = {name: _key(folder, name, roles) for name, roles in KEYS.items()}
    ports = iter(free_ports(11))
    sections: dict[str, dict[str, object]] = {
        "generator": {"model": str(MODEL)},
        "reward": {"model": str(folder / "reward")},
        "reference": {"model": str(MODEL)},
        "trainer": {"folder": str(folder / "runs"), "keep_versions": 4},
        "gateway": {"auth": {"keys_file": str(folder / "keys.yaml")}, "http_port": next(ports)},
    }
    for section in sections.values():
        section |= {"port": next(ports), "metrics_port": next(ports)}
    path = folder / "up.yaml"
    with ExitStack() as stack:
        labeling, token_file = stack.enter_context(judged_comparison(folder, wins=7, losses=3))
        sections["gateway"] |= {"labeling": labeling, "labeling_token_file": str(token_file)}
        path.write_text(yaml.safe_dump({"folder": str(folder / "logs"), "store": str(folder / "store"), **sections}))
        stack.enter_context(running_up(path, len(sections)))
        addresses = {name: f"127.0.0.1:{section['port']}" for name, section in sections.items()}
        train(folder, addresses, steps)
        url = f"http://127.0.0.1:{sections['gateway']['http_port']}"
        yield Room(url, addresses["trainer"], folder / "store", tokens)


KEYS = {"watcher": ("train",), "root": ("train", "generate", "admin"), "scorer": ("score",)}


def _key(folder: Path, name: str, roles: tuple[str, ...]) -> str:
    flags = [part for role in roles for part in ("--role", role)]
    made = trimtab("keys", "add", name, *flags, "--file", str(folder / "keys.yaml"))
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@contextmanager
def running_up(path: Path, services: int) -> Iterator[None]:
    """`trimtab up`, once everything serves; SIGTERM ends it."""
    process = subprocess.Popen([*TRIMTAB, "up", "-c", str(path)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        for _ in range(services):
            wait_for(process, ": serving")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def train(folder: Path, addresses: dict[str, str], steps: int) -> None:
    """A whole run, prompts twice a step, so that those of step 1 come again."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    config = trainer_pb2.PpoConfig(
        stage=trainer_pb2.StageConfig(
            model=str(MODEL), max_length=96, optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
        ),
        prompts=str(prompts),
        steps=steps,
        batch_size=12,
        minibatch_size=6,
        samples_per_prompt=2,
        max_new_tokens=40,
        kl_coefficient=0.01,
        **{f"{name}_address": addresses[name] for name in ("generator", "reward", "reference")},
    )
    with TrainerClient(addresses["trainer"]) as client:
        client.start(RUN, config)
        *_, last = client.watch(RUN, timeout_s=600)
        assert getattr(last, "state", "") == "succeeded", last


def http(room: Room, name: str | None = None) -> httpx2.Client:
    """A client of the gateway, signed in as `name`."""
    headers = {"authorization": f"Bearer {room.tokens[name]}"} if name else {}
    return httpx2.Client(base_url=room.url, headers=headers, timeout=30)


if __name__ == "__main__":  # keeps a room open: python -m tests.services.gateway.dashboard_room FOLDER STEPS
    with open_room(Path(sys.argv[1]), int(sys.argv[2])) as opened:
        print(opened, flush=True)
        os.read(0, 1)

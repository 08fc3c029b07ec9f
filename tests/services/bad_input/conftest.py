"""The process that holds every service of trimtab, for tests that send it what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimtab.weights.store import open_store
from trimtab_client import RewardClient

START_S = 240.0


@dataclass(frozen=True)
class Running:
    """The process of every service, where they listen (the gateway's HTTP as "http"), and their tokenizer's digest."""

    process: subprocess.Popen[bytes]
    addresses: dict[str, str]
    digest: str

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def running(make_tiny, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("every-service")
    store = open_store(str(folder / "store"))
    store.publish(make_tiny("reward", seed=1), run_id="rm", name="reward", step=1)
    make_tiny("policy").rename(folder / "policy")
    script = Path(__file__).with_name("every_service.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    log = (folder / "log").open("wb")
    command = [sys.executable, str(script), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, cwd=folder, env=environment)
    try:
        written = folder / "addresses.json"
        until = time.monotonic() + START_S
        while not written.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert written.exists(), (folder / "log").read_text()[-2000:]
        addresses = json.loads(written.read_text())
        with RewardClient(addresses["reward"]) as client:
            digest = client.get_model().tokenizer_digest
        yield Running(process, addresses, digest)
    finally:
        process.kill()
        process.wait()
        log.close()

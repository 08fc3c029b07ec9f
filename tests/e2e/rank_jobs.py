"""`trimtab job` as a process of its own, its trainer on one rank or under torchrun on several."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.rounds.launchers.services import free_ports
from trimtab.weights.store import Store, open_store

TORCHRUN = "--standalone --nproc-per-node 2 --max-restarts 3"
LONGEST_S = 280.0


class Job:
    """`trimtab job` in a folder, with its trainer on one or two ranks."""

    def __init__(
        self, folder: Path, run_id: str, stage: str, config: dict, *, torchrun: str = "", **trainer: object
    ) -> None:
        """`trainer` are more settings of the trainer."""
        self.folder, self.run_id = folder, run_id
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"port": free_ports(1)[0], "metrics_port": None, "threads": 1}
        settings |= {"store": str(folder / "store"), "folder": str(folder / "runs")} | trainer
        self.address, self._store = f"127.0.0.1:{settings['port']}", str(settings["store"])
        (folder / "trainer.yaml").write_text(yaml.safe_dump(settings))
        run = folder / f"{run_id}.yaml"
        run.write_text(yaml.safe_dump({"run_id": run_id, "stage": stage, "config": config}))
        command = [sys.executable, "-m", "trimtab", "job", "--config", str(folder / "trainer.yaml"), "--run", str(run)]
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--torchrun", torchrun] if torchrun else command,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    @property
    def store(self) -> Store:
        return open_store(self._store)

    def rows(self, file: str = "metrics.jsonl") -> list[dict]:
        path = self.folder / "runs" / self.run_id / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def kill_rank_after(self, rank: int, step: int) -> None:
        """SIGKILL one rank once a step is reported."""
        self.wait_for(lambda: len(self.rows()) >= step)
        pid = self._pid(rank)
        assert pid is not None, f"rank {rank} does not run"
        os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL the job's own process, and only that."""
        self.process.kill()
        self.process.wait()

    def runs(self, rank: int) -> bool:
        """Whether torchrun has started the rank; it may still be importing."""
        return self._pid(rank) is not None

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, while the job runs."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)

    def _pid(self, rank: int) -> int | None:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            mine = str(self.folder / "trainer.yaml").encode() in line
            if mine and f"RANK={rank}".encode() in environment.split(b"\0"):
                return int(entry.name)
        return None

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The published model's parameters, once the job has ended well."""
        code = self.process.wait(LONGEST_S)
        assert code == 0, (self.folder / "log").read_text()[-5000:]
        manifest = self.store.current(self.run_id, name)
        assert manifest is not None
        loaded = (ScalarModel if name == "reward" else Policy).load(str(self.store.fetch(manifest)))
        return {key: value.detach() for key, value in loaded.model.named_parameters()}

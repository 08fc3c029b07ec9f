"""A trainer as a batch job: the trainer service in a child process, and beside it the one run that the job is for.

The run lies in a file (`RunFile`), so the job needs nobody to start it, and a pod that takes another's place goes on
with it: Start is idempotent and the trainer resumes. The exit code is what a Kubernetes Job's podFailurePolicy reads.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml
from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.rounds.launchers.process import is_serving, tethered
from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.logs import configure_logs, get_logger
from trimtab_client import (
    AlreadyExists,
    ChannelOptions,
    InvalidArgument,
    RunStatus,
    StepMetrics,
    Tls,
    TrainerClient,
    TrimtabError,
    Unavailable,
)
from trimtab_client.v1 import trainer_pb2

log = get_logger(__name__)

DONE, FAILED, WRONG_SETTINGS, INTERRUPTED = 0, 1, 42, 143
POLL_S = 0.2
HEALTH = "trimtab.v1.TrainerService"
MESSAGES = {"sft": trainer_pb2.SftConfig, "reward": trainer_pb2.RewardModelConfig, "ppo": trainer_pb2.PpoConfig}


class RunFileError(ValueError):
    """A run's file cannot be used; one line names the key."""


class RunFile(BaseModel):
    """One run: `config` holds the keys of the stage's message in protos/trimtab/v1/trainer.proto, as JSON has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    stage: Literal["sft", "reward", "ppo"]
    config: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> RunFile:
        """Read a YAML or JSON file. RunFileError."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise RunFileError(f"{path}: {' '.join(str(error).split())}") from error

    @property
    def message(self) -> trainer_pb2.SftConfig | trainer_pb2.RewardModelConfig | trainer_pb2.PpoConfig:
        """The config as it travels. RunFileError for a key that the stage does not have."""
        try:
            return json_format.ParseDict(self.config, MESSAGES[self.stage]())
        except json_format.ParseError as error:
            raise RunFileError(f"config: {error}") from error

    @classmethod
    def of(cls, run_id: str, stage: str, message: Any) -> RunFile:
        """The file of a run whose config is a message."""
        config = json_format.MessageToDict(message, preserving_proto_field_name=True)
        return cls(run_id=run_id, stage=stage, config=config)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainerJob:
    """What the job runs. `torchrun` holds torchrun's own arguments where a run has several processes.

    `rank` is this pod's place among those of the run; the first one's trainer serves and is told the run.
    """

    config: ServiceConfig
    config_path: Path
    run: RunFile | None = None
    torchrun: str = ""
    rank: int = 0

    @property
    def command(self) -> list[str]:
        """The trainer's command line."""
        serve = ["-m", "trimtab", "serve", "trainer", "--config", str(self.config_path)]
        if not self.torchrun:
            return [sys.executable, *serve]
        return [sys.executable, "-m", "torch.distributed.run", *shlex.split(self.torchrun), *serve]

    def execute(self) -> int:
        """Run to the end; returns DONE, FAILED, WRONG_SETTINGS or INTERRUPTED (SIGTERM: another pod shall go on)."""
        configure_logs(self.config.log_level, self.config.log_format)
        child = subprocess.Popen(tethered(self.command))
        with _forwarding(child) as interrupted:
            code = self._hold(child, interrupted)
            if child.poll() is None:
                child.terminate()
            ended = child.wait()
        if interrupted.is_set():
            return INTERRUPTED
        if code is not None:
            return code
        return DONE if ended == 0 else FAILED

    def _hold(self, child: subprocess.Popen[bytes], interrupted: threading.Event) -> int | None:
        """Tell the trainer its run and see that to its end; None where the trainer's own end decides."""
        if self.run is None or self.rank:
            child.wait()
            return None
        if not self._wait_serving(child, interrupted):
            return None
        with TrainerClient(*self._connection()) as client:
            while child.poll() is None and not interrupted.is_set():
                try:
                    return self._follow(client, self.run)
                except (InvalidArgument, AlreadyExists) as error:
                    log.error("the run was refused", run_id=self.run.run_id, reason=str(error))
                    return WRONG_SETTINGS
                except Unavailable:
                    interrupted.wait(POLL_S)  # it drains, or it is gone: the loop sees which
                except TrimtabError as error:
                    log.error("the run was lost", run_id=self.run.run_id, reason=str(error))
                    return FAILED
        return None

    def _wait_serving(self, child: subprocess.Popen[bytes], interrupted: threading.Event) -> bool:
        port = self.config.health_port or self.config.port
        while child.poll() is None and not interrupted.is_set():
            if is_serving(f"127.0.0.1:{port}", HEALTH):
                return True
            interrupted.wait(POLL_S)
        return False

    def _connection(self) -> tuple[str, ChannelOptions]:
        """The trainer of this pod: by the name that its certificate has for that, with the same certificate."""
        config = self.config
        if not config.has_tls:
            return f"127.0.0.1:{config.port}", ChannelOptions()
        tls = Tls(config.tls_client_ca, config.tls_cert, config.tls_key)
        return f"localhost:{config.port}", ChannelOptions(tls=tls)

    def _follow(self, client: TrainerClient, run: RunFile) -> int:
        client.start(run.run_id, run.message)
        activity = ""
        for event in client.watch(run.run_id):
            if isinstance(event, StepMetrics):
                log.info("step", run_id=run.run_id, step=event.step, total_steps=event.total_steps, **event.values)
            elif event.finished:
                return _outcome(event)
            elif event.activity != activity:
                activity = event.activity
                log.info("activity", run_id=run.run_id, activity=activity)
        raise Unavailable("UNAVAILABLE", f"the stream of run {run.run_id} ended before the run did")


def _outcome(status: RunStatus) -> int:
    published = [str(version) for version in status.published]
    log.info("run ended", run_id=status.run_id, state=status.state, step=status.step, published=published)
    if status.state == "failed":
        log.error(f"run {status.run_id} failed at step {status.step}: {status.error}")
        return FAILED
    return DONE


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """SIGTERM and SIGINT go on to the child, and set the event."""
    interrupted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

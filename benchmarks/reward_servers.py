"""The three reward servers, started as a user would start them, each on one port of this machine until it is left.

OpenRLHF's needs flash-attn, which has no build for CPUs: a stand-in whose functions raise is put in its way; serve_rm
with sdpa attention never calls them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.rounds.launchers.services import thread_environment

MODEL_NAME = "reward"
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Server:
    """How a server is started; `dialect` is how it is asked, `side` what the tables call it."""

    side: str
    dialect: str
    command: tuple[str, ...]
    port: int
    metrics_port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def trimtab(model: Path, dtype: str, threads: int, *, own_process: bool) -> Server:
    """`trimtab serve reward`, texts read as the bare tokenizer reads them."""
    port, metrics_port = free_port(), free_port()
    settings = {
        "dtype": dtype,
        "threads": threads,
        "metrics_port": metrics_port,
        "text_encoding": "plain",
        "own_process": own_process,
    }
    command = [sys.executable, "-m", "trimtab", "serve", "reward", "--model", str(model), "--port", str(port)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    side = "trimtab, own process" if own_process else "trimtab"
    return Server(side, "trimtab", tuple(command), port, metrics_port, thread_environment(threads))


def openrlhf(python: Path, model: Path, threads: int, scratch: Path) -> Server:
    """OpenRLHF's serve_rm, which computes in bfloat16 only."""
    port = free_port()
    command = [str(python), "-m", "openrlhf.cli.serve_rm", "--reward.model_name_or_path", str(model)]
    command += ["--ds.attn_implementation", "sdpa", "--host", "127.0.0.1", "--port", str(port)]
    environment = thread_environment(threads) | {"PYTHONPATH": str(write_flash_attn_stand_in(scratch))}
    return Server("OpenRLHF", "openrlhf", tuple(command), port, environment=environment)


def vllm(python: Path, model: Path, dtype: str, threads: int) -> Server:
    """vLLM's OpenAI server in its pooling mode, eager: compiling gains nothing on models this small."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL_NAME, "--runner", "pooling", "--convert", "classify", "--enforce-eager"]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    environment = thread_environment(threads) | {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return Server("vLLM", "vllm", tuple(command), port, environment=environment)


def write_flash_attn_stand_in(scratch: Path) -> Path:
    """A folder to import from that holds the names of flash-attn which OpenRLHF imports."""
    refuse = "def refuse(*args, **kwargs):\n    raise RuntimeError('flash-attn is not here')\n\n\n"
    files = {
        "__init__.py": "",
        "bert_padding.py": refuse + "index_first_axis = pad_input = rearrange = unpad_input = refuse\n",
        "utils/__init__.py": "",
        "utils/distributed.py": refuse + "all_gather = refuse\n",
    }
    root = scratch / "stand-ins"
    for name, text in files.items():
        path = root / "flash_attn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@contextmanager
def running(server: Server, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process once its port is open; ended with all its children. RuntimeError where it ends itself."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **server.environment}
    with log.open("wb") as lines:
        process = subprocess.Popen(
            server.command, stdout=lines, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        ends = time.monotonic() + START_TIMEOUT_S
        while not _is_open(server.port):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{' '.join(server.command)} does not serve; its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM and, ten seconds later, SIGKILL to the session that `running` made."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _is_open(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0

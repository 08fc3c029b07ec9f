"""trimtab's services as processes: names, default ports, config files and thread budgets."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

import yaml

from trimtab.rounds.launchers.process import ProcessSpec

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServiceKind:
    """What `trimtab serve NAME` runs and how its health is asked."""

    name: str
    health_service: str
    default_port: int
    config_class: str
    needs_model: bool = True

    @property
    def config_module(self) -> str:
        """The module of its config class; imports no torch."""
        return f"trimtab.{self.name}.config"

    @property
    def service_module(self) -> str:
        """The module with `main(config) -> int`."""
        return f"trimtab.{self.name}.service"


SERVICES: Mapping[str, ServiceKind] = {
    kind.name: kind
    for kind in (
        ServiceKind("generator", "trimtab.v1.GeneratorService", 7101, "GeneratorConfig"),
        ServiceKind("reward", "trimtab.v1.RewardService", 7102, "RewardConfig"),
        ServiceKind("reference", "trimtab.v1.ReferenceService", 7103, "ReferenceConfig"),
        ServiceKind("trainer", "trimtab.v1.TrainerService", 7104, "TrainerConfig", needs_model=False),
        ServiceKind("gateway", "inference.GRPCInferenceService", 7105, "GatewayConfig", needs_model=False),
    )
}


def free_ports(count: int) -> list[int]:
    """`count` different loopback ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind((LOOPBACK, 0))
        return [held.getsockname()[1] for held in sockets]


def thread_environment(threads: int) -> dict[str, str]:
    """Environment that keeps a process to `threads` cores and lets idle threads soon sleep.

    GNU's OpenMP goes by its spin count: some microseconds, so that the threads of one step stay awake between its short
    ops, and a process that waits for another takes no core from it. Other runtimes go by the wait policy.
    """
    count = str(threads)
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} | waiting


def trainer_memory_environment() -> dict[str, str]:
    """Environment that lets the trainer keep the memory of one step for the next, in huge pages and in little of it.

    jemalloc where it is installed (Debian's libjemalloc2) and nothing else is preloaded: it keeps small pieces apart
    from large ones, and gives back what nobody took for 20 s. GNU's malloc, which gives large pieces back at once and
    has them zeroed again (millions of page faults a PPO step of a small model), is told to keep all; small pieces then
    stand where the next large one does not fit. Huge pages come where the kernel gives them to who asks. What each
    gives: docs/results/ppo_step.md.
    """
    jemalloc = find_library("jemalloc") if sys.platform == "linux" and "LD_PRELOAD" not in os.environ else None
    if jemalloc is not None:
        kept = "narenas:1,oversize_threshold:0,dirty_decay_ms:20000,muzzy_decay_ms:0,thp:always"
        return {"LD_PRELOAD": jemalloc, "MALLOC_CONF": kept}
    kept = str(4 << 30)
    thresholds = {"MALLOC_MMAP_THRESHOLD_": kept, "MALLOC_TRIM_THRESHOLD_": kept}
    tunables = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": tunables} | thresholds


def fair_threads(processes: int) -> int:
    """Threads for each of `processes` services that share this machine's cores; at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // max(1, processes))


def service_process(
    kind: str,
    settings: Mapping[str, object],
    folder: Path,
    *,
    threads: int = 1,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
) -> ProcessSpec:
    """Describe `trimtab serve KIND` with `settings` as its config file, written under `folder`.

    `port` and `metrics_port` are chosen when `settings` has none, and with TLS a `health_port` for the supervisor. The
    log goes to `folder`/NAME.log.
    """
    service, name = SERVICES[kind], name or kind
    port, metrics_port, health_port = free_ports(3)
    defaults: dict[str, object] = {"host": LOOPBACK, "port": port, "metrics_port": metrics_port, "threads": threads}
    if settings.get("tls_cert"):
        defaults["health_port"] = health_port
    values = defaults | dict(settings)
    host = {"0.0.0.0": LOOPBACK, "::": "[::1]", "[::]": "[::1]"}.get(str(values["host"]), values["host"])
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / f"{name}.yaml"
    config_path.write_text(yaml.safe_dump(values, sort_keys=False))
    return ProcessSpec(
        name=name,
        command=(sys.executable, "-m", "trimtab", "serve", kind, "--config", str(config_path)),
        address=f"{host}:{values['port']}",
        health_address=f"{host}:{values.get('health_port') or values['port']}",
        health_service=service.health_service,
        log_path=folder / f"{name}.log",
        env=thread_environment(threads)
        | (trainer_memory_environment() if kind == "trainer" else {})
        | {"PYTHONUNBUFFERED": "1"}
        | dict(env or {}),
        stops_first=kind == "trainer",
    )

"""The memory that is there: this machine's, or that of a machine of which only the GPUs are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CPU = "cpu"
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Device:
    """`cpu` or `cuda:N`, the bytes of its memory that processes may still take, and all that a GPU has."""

    name: str
    free_bytes: int
    gpu_bytes: int = 0


def devices_at_hand() -> dict[str, Device]:
    """This machine's memory and GPUs, less what is taken already."""
    import torch

    found = {CPU: Device(CPU, host_free_bytes())}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found[f"cuda:{number}"] = Device(f"cuda:{number}", *torch.cuda.mem_get_info(number))
    return found


def devices_given(gpus: int, gpu_memory_bytes: int) -> dict[str, Device]:
    """Another machine's GPUs. Nothing is known of its host memory, so nothing is checked against it."""
    return {f"cuda:{number}": Device(f"cuda:{number}", gpu_memory_bytes, gpu_memory_bytes) for number in range(gpus)}


def host_free_bytes() -> int:
    """Memory that this machine can still give, or this container where that is less."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines()) if MEMINFO.exists() else {}
    free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else 1 << 62
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)

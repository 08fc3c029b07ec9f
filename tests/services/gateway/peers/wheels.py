"""Peers' own client code, read from their wheels at the pinned version; nothing of it is kept here."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[4] / "build" / "peers"


def unpacked(name: str, version: str) -> Path:
    """The folder of a pure wheel's modules; skips where the package index cannot be reached."""
    folder = FOLDER / f"{name}-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(FOLDER), f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"cannot download {name} {version}: {done.stderr.strip()[-200:]}")
        (wheel,) = FOLDER.glob(f"{name}-{version}-*.whl")
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(folder)
    inner = folder / f"{name}-{version}.data" / "purelib"
    return inner if inner.exists() else folder

"""Environments of peers: made once with pip from a pinned requirements file, then reused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MADE_FROM = "made-from.txt"


def ensure_environment(folder: Path, requirements: Path) -> Path:
    """The interpreter of a virtual environment that holds exactly what `requirements` pins, made if it is missing."""
    python, stamp = folder / "bin" / "python", folder / MADE_FROM
    wanted = requirements.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {folder} from {requirements.name} (a minute or two)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)], check=True)
    stamp.write_text(wanted)  # last: its presence says that pip finished
    return python

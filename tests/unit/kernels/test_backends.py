"""Both backends keep the same promises, Triton in its interpreter. Each in a process of its own: Triton decides at
import whether it interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("backend", "files"),
    [("torch", ["backend_promises.py"]), ("triton", ["backend_promises.py", "interpreted_triton.py"])],
)
def test_promises_hold(backend, files):
    environment = os.environ | {"TRIMTAB_KERNELS": backend, "OMP_NUM_THREADS": "1"}
    if backend == "triton":
        pytest.importorskip("triton")
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:cov", *files]
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

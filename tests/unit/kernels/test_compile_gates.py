"""Every Triton kernel compiles for GPUs that are not here: no spills, shared memory that fits, tensor cores in use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
OVER_THE_HEAD = {"statistics", "gradient", "exponentials"}
OLDER_TRITON = Path(__file__).parents[3] / "build" / "triton-3.6.0"  # `make build/triton-3.6.0`


def compiled(environment, capabilities):
    command = [sys.executable, "-m", "trimtab.kernels.compile_targets", "--capabilities", *map(str, capabilities)]
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    ("version", "capabilities"),
    [
        ("installed", [90]),
        pytest.param("installed", [80, 100], marks=pytest.mark.slow),
        pytest.param("3.6.0", [80, 90, 100], marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_spilling_and_use_the_tensor_cores(version, capabilities):
    if version == "3.6.0" and not OLDER_TRITON.is_dir():
        pytest.skip("no Triton 3.6.0 in build/: `make build/triton-3.6.0`")
    results = compiled({"PYTHONPATH": str(OLDER_TRITON)} if version == "3.6.0" else {}, capabilities)
    assert {result["capability"] for result in results} == set(capabilities)
    assert version == "installed" or {result["triton"] for result in results} == {version}
    for result in results:
        allowed = 1 if result["kernel"] == "kl" else 0  # 3.7.1 parks one value on sm_100, once a row
        assert result["spills"] <= allowed, result
        assert result["shared_bytes"] <= SHARED_LIMIT[result["capability"]], result
        if result["kernel"] in OVER_THE_HEAD and result["dtype"] == "bf16":
            assert result["tensor_core_instructions"] > 0, result
            assert (result["bulk_copies"] > 0) == (result["capability"] >= 90), result

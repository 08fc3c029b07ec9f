"""No [N, V] tensor is ever formed: the memory of a train step does not grow with the rows."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "train_step_memory.py"
VOCAB = 128_256


def peak_mb(rows: int) -> float:
    command = [sys.executable, SCRIPT, str(VOCAB), str(rows)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_a_ppo_step_over_a_large_vocabulary_never_holds_all_logits():
    rows = 1024
    logits_mb = rows * VOCAB * 4 / 2**20  # 501 MB, and plain torch holds several such
    assert peak_mb(rows) < 0.75 * logits_mb

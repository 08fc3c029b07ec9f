"""Two functions at once: both results, the thread shares, errors."""

import threading
from contextlib import closing

import pytest
import torch

from trimtab.trainer.side_by_side import SideBySide


def test_both_run_at_once_each_on_its_share_of_the_threads():
    meeting = threading.Barrier(2, timeout=10)

    def threads():
        meeting.wait()  # passes only if the other one runs too
        return torch.get_num_threads()

    with closing(SideBySide("cpu", threads=3)) as both:
        assert both.run(threads, threads) == (2, 1)


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cuda", 8)])
def test_one_thread_or_a_gpu_takes_them_in_turn(device, threads):
    seen = []
    SideBySide(device, threads).run(lambda: seen.append(1), lambda: seen.append(2))
    assert seen == [1, 2]


def test_an_error_waits_for_the_other_and_is_raised():
    done = threading.Event()

    def fail():
        raise ValueError("no")

    with closing(SideBySide("cpu", threads=2)) as both, pytest.raises(ValueError, match="no"):
        both.run(fail, lambda: (threading.Event().wait(0.05), done.set()))
    assert done.is_set()

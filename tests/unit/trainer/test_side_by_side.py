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


def test_what_one_does_alone_gets_all_threads_while_the_other_waits():
    seen, worked = [], []

    def work(number):
        threading.Event().wait(0.02)
        worked.append(number)
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    def first(both):
        with torch.no_grad():
            for number in range(3):
                seen.append(both.alone(lambda number=number: work(number)))
        return "first"

    def second(both):
        for number in range(3):
            threading.Event().wait(0.01)  # the first is there before
            both.make_way()
            assert len(worked) > number, "it went on before the work was done"
        return "second"

    with closing(SideBySide("cpu", threads=3)) as both:
        assert both.run(lambda: first(both), lambda: second(both)) == ("first", "second")
    assert seen == [(number, 3, False) for number in range(3)]


@pytest.mark.parametrize("ends", ["first", "second"])
def test_nobody_waits_for_one_that_has_ended(ends):
    with closing(SideBySide("cpu", threads=2)) as both:
        if ends == "first":
            assert both.run(lambda: 1, lambda: both.make_way()) == (1, None)
        else:
            assert both.run(lambda: both.alone(lambda: 1), lambda: 2) == (1, 2)


def test_an_error_in_what_one_does_alone_is_its_own():
    def fail():
        raise ValueError("no")

    with closing(SideBySide("cpu", threads=2)) as both:
        with pytest.raises(ValueError, match="no"):
            both.run(lambda: both.alone(fail), both.make_way)
        assert both.run(lambda: both.alone(lambda: 1), both.make_way) == (1, None), "the next run is a new one"


def test_off_the_cpu_work_alone_is_just_work():
    both = SideBySide("cuda", 8)
    assert both.run(lambda: both.alone(lambda: 1), both.make_way) == (1, None)

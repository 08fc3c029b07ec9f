"""Tests compute on one thread each: several run at a time, and a team of threads that outlives the test that wanted it
makes every op of the tests after it wait for a second core.
"""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def one_compute_thread() -> Iterator[None]:
    """torch's number of threads is 1 before a test and after it, whatever it needed."""
    _compute_alone()
    yield
    _compute_alone()


def _compute_alone() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)

"""Work on several threads comes out as on one, and holds no more than a few results."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from trimtab.weights.digests import digest_file, folder_content_digest
from trimtab.weights.parallel import in_order, thread_budget


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("2,4", 2), ("0", 1), ("", None), ("many", None)])
def test_the_budget_is_the_processes(given: str, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert thread_budget() == (threads or len(os.sched_getaffinity(0)))


def test_results_come_in_order_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count(1):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        time.sleep(0.01 * (item % 3))
        return item

    with closing(in_order(work, items())) as results:
        for count, result in enumerate(itertools.islice(results, 20), 1):
            assert result == count and len(taken) <= count + 3
    assert list(in_order(work, [])) == []


def test_an_error_ends_the_work_where_it_belongs() -> None:
    results = in_order(lambda item: 1 // item, [2, 1, 0, 5])
    assert (next(results), next(results)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_digests_are_the_same_on_any_number_of_threads(
    threads: str, tmp_path: Path, write_safetensors: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    values = np.arange(1_000_000, dtype=np.int32)
    write_safetensors(tmp_path / "m.safetensors", {"a": values, "b": values[:7], "c": values[::2].copy()})
    data = (tmp_path / "m.safetensors").read_bytes()
    assert digest_file(tmp_path / "m.safetensors") == f"blake3:{blake3(data).hexdigest()}"
    known = "blake3:2cfa41d7adbec9b5019dae6816014f5fcfd7adbaa0ddd1c21642e8f9b5305a33"
    assert folder_content_digest(tmp_path, ["m.safetensors"]) == known

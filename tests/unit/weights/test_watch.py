import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.weights.store import Store, open_store
from trimtab.weights.watch import PointerWatcher

MakeFolder = Callable[..., Path]


async def next_step(watcher: PointerWatcher, timeout_s: float = 10.0) -> int:
    return (await asyncio.wait_for(anext(watcher), timeout_s)).version.step


async def test_watcher_reports_the_current_version_then_each_move(store: Store, make_folder: MakeFolder) -> None:
    watcher = PointerWatcher(store, "r", "policy", interval_s=0.01)
    first = asyncio.create_task(next_step(watcher))
    await asyncio.sleep(0.05)
    assert not first.done(), "nothing is published yet"
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    assert await first == 1
    store.publish(make_folder(seed=2), run_id="r", name="policy", step=2)
    store.publish(make_folder(seed=3), run_id="r", name="policy", step=3)
    assert await next_step(watcher) == 3
    store.set_current("r", "policy", 1)
    assert await next_step(watcher) == 1, "a roll back is a move"
    store.publish(make_folder(seed=9), run_id="r", name="policy", step=9, set_current=False)
    with pytest.raises(TimeoutError):
        await next_step(watcher, timeout_s=0.1)


async def test_what_is_served_already_is_not_reported(store: Store, make_folder: MakeFolder) -> None:
    served = store.publish(make_folder(seed=1), run_id="r", name="policy", step=1).version
    watcher = PointerWatcher(store, "r", "policy", interval_s=0.01, seen=served)
    with pytest.raises(TimeoutError):
        await next_step(watcher, timeout_s=0.1)
    store.publish(make_folder(seed=2), run_id="r", name="policy", step=2)
    assert await next_step(watcher) == 2


async def test_a_nudge_does_not_wait_for_the_interval(store: Store, make_folder: MakeFolder) -> None:
    watcher = PointerWatcher(store, "r", "policy", interval_s=3600)
    following = asyncio.create_task(next_step(watcher))
    await asyncio.sleep(0.05)
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    began = time.monotonic()
    watcher.nudge()
    assert await following == 1
    assert time.monotonic() - began < 5


async def test_watcher_outlives_a_store_that_fails_for_a_while(
    tmp_path: Path, make_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    pointer = tmp_path / "store/r/policy/current.json"
    good = pointer.read_bytes()
    pointer.write_bytes(b"{")
    watcher = PointerWatcher(store, "r", "policy", interval_s=0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError):
        await next_step(watcher, timeout_s=0.2)
    assert len(caplog.records) == 1 and "cannot follow r/policy" in caplog.text
    assert "is not a pointer" in str(watcher.last_error)
    pointer.write_bytes(good)
    assert await next_step(watcher) == 1
    assert watcher.last_error is None


def test_watcher_refuses_an_interval_that_would_spin(local_store: Store) -> None:
    with pytest.raises(ValueError, match="interval_s is 0"):
        PointerWatcher(local_store, "r", "policy", interval_s=0)

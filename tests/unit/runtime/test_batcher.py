"""What the batcher computes, in which order, and what it never computes."""

import asyncio
import threading
import time

import pytest
from grpc import StatusCode

from trimtab.runtime.batcher import Batcher
from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import ServiceError
from trimtab.runtime.metrics import Metrics


class Device:
    """A compute function that notes its batches and can be held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Event()

    def compute(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.started.set()
        assert self.free.wait(10)
        return [ValueError(f"bad {item}") if item < 0 else item * 10 for item in items]

    @property
    def computed(self) -> list[int]:
        return [item for batch in self.batches for item in batch]


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def make_batcher(device):
    worker = DeviceWorker("test-device")

    def make(max_tokens=100, queue_limit=100) -> Batcher[int, int]:
        return Batcher(device.compute, worker, max_tokens_per_batch=max_tokens, queue_limit=queue_limit)

    yield make
    device.free.set()
    worker.close()


async def hold(device: Device, batcher: Batcher[int, int]) -> asyncio.Task[int]:
    """Occupy the device with item 999."""
    device.free.clear()
    task = asyncio.create_task(batcher.submit(999, 1))
    assert await asyncio.to_thread(device.started.wait, 10)
    return task


async def test_results_come_back_in_the_order_of_the_items(make_batcher, device):
    assert await make_batcher().submit_all([3, 1, 2], [30, 10, 20]) == [30, 10, 20]
    assert device.batches == [[1, 2, 3]], "shortest first on the device"


async def test_what_waits_goes_together_up_to_the_token_budget(make_batcher, device):
    batcher = make_batcher(max_tokens=10)
    held = await hold(device, batcher)
    waiting = [asyncio.create_task(batcher.submit(item, 4)) for item in range(5)]
    await asyncio.sleep(0)
    device.free.set()
    await asyncio.gather(held, *waiting)
    assert device.batches == [[999], [0, 1], [2, 3], [4]]


async def test_an_item_larger_than_the_budget_goes_alone(make_batcher, device):
    batcher = make_batcher(max_tokens=10)
    assert await batcher.submit_all([1, 2], [50, 50]) == [10, 20]
    assert device.batches == [[1], [2]]


async def test_the_nearest_deadline_goes_first_and_none_goes_last(make_batcher, device):
    batcher = make_batcher(max_tokens=1)
    held = await hold(device, batcher)
    now = time.monotonic()
    waiting = [
        asyncio.create_task(batcher.submit(item, 1, deadline))
        for item, deadline in [(1, None), (2, now + 90), (3, now + 30)]
    ]
    await asyncio.sleep(0)
    device.free.set()
    await asyncio.gather(held, *waiting)
    assert device.computed == [999, 3, 2, 1]


async def test_cancelled_work_is_never_computed_and_frees_its_place(make_batcher, device):
    batcher = make_batcher()
    held = await hold(device, batcher)
    doomed = asyncio.create_task(batcher.submit_all([1, 2], [1, 1]))
    kept = asyncio.create_task(batcher.submit(3, 1))
    await asyncio.sleep(0)
    assert batcher.waiting == 3
    doomed.cancel()
    await asyncio.sleep(0.01)
    assert batcher.waiting == 1
    device.free.set()
    assert await kept == 30
    await held
    assert device.computed == [999, 3]


async def test_expired_work_is_never_computed(make_batcher, device):
    batcher = make_batcher()
    held = await hold(device, batcher)
    late = asyncio.create_task(batcher.submit(1, 1, time.monotonic() + 0.02))
    await asyncio.sleep(0.05)
    device.free.set()
    with pytest.raises(ServiceError) as caught:
        await late
    assert caught.value.code == StatusCode.DEADLINE_EXCEEDED
    await held
    assert device.computed == [999]


async def test_a_full_queue_refuses_with_a_time_to_retry_and_takes_no_part_of_the_call(make_batcher, device):
    batcher = make_batcher(queue_limit=3)
    held = await hold(device, batcher)
    waiting = asyncio.create_task(batcher.submit_all([1, 2], [1, 1]))
    await asyncio.sleep(0)
    with pytest.raises(ServiceError) as caught:
        await batcher.submit_all([3, 4], [1, 1])
    assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    device.free.set()
    await asyncio.gather(held, waiting)
    assert device.computed == [999, 1, 2]


async def test_an_empty_queue_takes_a_call_of_any_size(make_batcher):
    assert len(await make_batcher(queue_limit=2).submit_all(list(range(9)), [1] * 9)) == 9


async def test_an_item_that_fails_does_not_fail_its_mates(make_batcher, device):
    batcher = make_batcher()
    held = await hold(device, batcher)
    bad = asyncio.create_task(batcher.submit(-7, 1))
    good = asyncio.create_task(batcher.submit(7, 1))
    await asyncio.sleep(0)
    device.free.set()
    with pytest.raises(ValueError, match="bad -7"):
        await bad
    assert await good == 70
    await held


async def test_a_device_that_fails_fails_the_batch_and_serves_the_next():
    worker = DeviceWorker("test-device")
    calls = []

    def compute(items: list[int]) -> list[int]:
        calls.append(items)
        if len(calls) == 1:
            raise MemoryError("device is out of memory")
        return items

    batcher = Batcher(compute, worker, max_tokens_per_batch=10, queue_limit=10)
    with pytest.raises(MemoryError):
        await batcher.submit(1, 1)
    assert await batcher.submit(2, 1) == 2
    worker.close()


async def test_closing_refuses_what_waits_and_what_comes(make_batcher, device):
    batcher = make_batcher()
    held = await hold(device, batcher)
    waiting = asyncio.create_task(batcher.submit(1, 1))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    device.free.set()
    await closing
    assert await held == 9990
    for refused in (waiting, batcher.submit(2, 1)):
        with pytest.raises(ServiceError) as caught:
            await refused
        assert caught.value.code == StatusCode.UNAVAILABLE
    assert device.computed == [999]


async def test_the_worker_runs_everything_on_its_one_thread():
    worker = DeviceWorker("only")
    names = await asyncio.gather(*(worker.run(lambda: threading.current_thread().name) for _ in range(5)))
    worker.close()
    assert set(names) == {"only_0"}


async def test_batches_are_counted():
    metrics, worker = Metrics(), DeviceWorker("test-device")
    batcher = Batcher(lambda items: items, worker, max_tokens_per_batch=100, queue_limit=10, metrics=metrics)
    await batcher.submit_all([1, 2], [3, 4])
    worker.close()
    value = metrics.registry.get_sample_value
    assert (value("trimtab_sequences_total"), value("trimtab_tokens_total"), value("trimtab_queue_depth")) == (2, 7, 0)

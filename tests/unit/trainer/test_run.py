"""What others ask of a run: a checkpoint is answered whoever else asked, and nobody who gives up does it harm."""

import asyncio
from concurrent.futures import Future

import pytest

from trimtab.trainer.run import Run, RunFailedError, RunState
from trimtab_client import ModelVersion

VERSION = ModelVersion("run", "policy", 3, "sha256:" + "0" * 64)


async def asking(run: Run) -> asyncio.Task:
    """A call that waits for a checkpoint, as the service's handler does."""

    async def call() -> tuple[ModelVersion, ...]:
        return await asyncio.wrap_future(run.checkpoint())

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    return task


async def test_a_run_outlives_callers_who_give_up_waiting_for_a_checkpoint() -> None:
    run = Run("run", "sft")
    gone, waiting = await asking(run), await asking(run)
    gone.cancel()
    await asyncio.sleep(0)
    run.between_steps(lambda: VERSION)
    assert await waiting == (VERSION,)
    assert gone.cancelled()


async def test_nothing_is_published_for_a_caller_who_is_gone() -> None:
    run = Run("run", "sft")
    gone = await asking(run)
    gone.cancel()
    await asyncio.sleep(0)
    run.between_steps(lambda: pytest.fail("published"))
    run.finish(RunState.SUCCEEDED)


async def test_a_caller_who_gives_up_at_the_end_does_not_keep_a_run_from_ending() -> None:
    run = Run("run", "sft")
    gone, waiting = await asking(run), await asking(run)
    gone.cancel()
    await asyncio.sleep(0)
    run.finish(RunState.STOPPED)
    assert run.snapshot.state is RunState.STOPPED
    with pytest.raises(RunFailedError, match="the run ended"):
        await waiting


def test_all_who_wait_hear_that_publishing_failed() -> None:
    run = Run("run", "sft")
    asked: list[Future] = [run.checkpoint(), run.checkpoint()]

    def publish() -> ModelVersion:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        run.between_steps(publish)
    for request in asked:
        with pytest.raises(OSError, match="no space"):
            request.result(timeout=0)

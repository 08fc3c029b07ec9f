"""How much memory a generator on vLLM takes: on GPUs a share of each, whatever the model; on a CPU what it is told.

vLLM is not asked: it may not be installed where the doctor runs. What it does is that of `generator/vllm/adapter.py`.
"""

from __future__ import annotations

import math

from trimtab.doctor.memory import DTYPE_BYTES, Need, forward_bytes
from trimtab.doctor.shapes import ModelShape
from trimtab.generator.config import CPU_KV_CACHE_GIB, GeneratorConfig

GIB = 1 << 30


def gpus(config: GeneratorConfig) -> list[str]:
    """Its GPUs: the first that it sees, whatever number `device` has."""
    return [f"cuda:{number}" for number in range(config.vllm.tensor_parallel_size)]


def share(config: GeneratorConfig, gpu_bytes: int) -> int:
    """Of a GPU's whole memory: so much must be free when vLLM starts, and all of it goes to weights, work and cache."""
    return math.ceil(config.vllm.gpu_memory_utilization * gpu_bytes)


def least(config: GeneratorConfig, shape: ModelShape) -> Need:
    """What each GPU must hold: its part of the weights, a step, and the cache that was asked for, else one sequence's.

    Heads are shared out, at least one of keys and values a GPU; logits are whole on each.
    """
    c, parts = DTYPE_BYTES[config.dtype], config.vllm.tensor_parallel_size
    a_token = 2 * shape.layers * -(-shape.kv_heads // parts) * shape.head_dim * c
    longest = min(config.max_length or shape.max_length, shape.max_length)
    cache_gib = config.vllm.kv_cache_gib
    cache = a_token * longest if cache_gib is None else int(cache_gib * GIB)
    return Need({"weights": -(-c * shape.parameters // parts), "KV cache": cache, **_step(config, shape)})


def on_cpu(config: GeneratorConfig, shape: ModelShape) -> Need:
    """All its processes together, with the policy that says what vLLM should compute.

    A new version is read as float32 and then in the served dtype; without a store, vLLM's weights are there twice when
    it checks itself.
    """
    c, processes = DTYPE_BYTES[config.dtype], config.vllm.tensor_parallel_size
    coming = (4 + c) * shape.parameters if config.store is not None else c * shape.parameters * config.self_check
    cache_gib = CPU_KV_CACHE_GIB if config.vllm.kv_cache_gib is None else config.vllm.kv_cache_gib
    return Need(
        {
            "weights": c * shape.parameters,
            "policy beside it": c * shape.parameters,
            **({"a new version": coming} if coming else {}),
            "KV cache": processes * int(cache_gib * GIB),
            **_step(config, shape),
        }
    )


def _step(config: GeneratorConfig, shape: ModelShape) -> dict[str, int]:
    tokens = config.prefill_tokens + config.max_slots
    return {
        "logits": 3 * 4 * config.max_slots * shape.vocabulary,
        "activations": forward_bytes(shape, DTYPE_BYTES[config.dtype], tokens),
    }

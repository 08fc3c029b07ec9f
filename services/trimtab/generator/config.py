"""Settings of the generator server."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.generator.engine import SwapMode
from trimtab.runtime.config import ServiceConfig

CPU_KV_CACHE_GIB = 2.0
"""vLLM's, where `kv_cache_gib` is empty on a CPU."""


class VllmOptions(BaseModel):
    """What only the vllm engine has. One setting means the same for both engines wherever it can."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share the model.")
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory to use.")
    kv_cache_gib: float | None = Field(
        default=None, gt=0, description="Size of the key-value cache; empty: what the GPU has left; 2 on a CPU."
    )
    eager: bool = Field(default=False, description="Neither compile nor capture graphs: starts faster, runs slower.")
    prefix_caching: bool = Field(default=True, description="Compute a prompt's blocks once for all that begin so.")


class GeneratorConfig(ServiceConfig):
    """One generator process: a policy, how it is batched, and how it follows new versions."""

    port: int = Field(default=7101, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9101, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

    engine: Literal["local", "vllm"] = Field(
        default="local", description="local: transformers, anywhere; vllm: needs trimtab[vllm], in its own environment."
    )
    vllm: VllmOptions = VllmOptions()

    model: str = Field(description="Folder, Hugging Face id or version:RUN/NAME[@STEP].")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What the model runs in.")
    follow: str | None = Field(default=None, description="RUN/NAME in the store whose pointer is followed.")
    poll_interval_s: float = Field(default=2.0, gt=0, description="How often the followed pointer is read.")
    swap_mode: SwapMode = Field(
        default=SwapMode.DRAIN,
        description="drain: in-flight sequences finish on the old version; keep: they go on with the new one; "
        "recompute_kv: as keep, their keys and values computed anew.",
    )

    max_length: int | None = Field(
        default=None, ge=2, description="Prompt and response together, tokens; empty: the model's own."
    )
    default_max_tokens: int = Field(default=256, ge=1, description="New tokens where a request does not say.")
    max_slots: int = Field(default=64, ge=1, description="Sequences decoded at once.")
    prefill_tokens: int = Field(default=2048, ge=1, description="Prompt tokens computed between two decode steps.")
    deterministic: bool = Field(default=False, description="A seed's sample has the same bits in any company; slower.")
    self_check: bool = Field(default=True, description="Compare the engine with full forwards before serving.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.follow is not None and self.store is None:
            raise ValueError("follow: needs a store to follow a pointer in")
        if self.deterministic and self.engine == "vllm":
            raise ValueError("deterministic: only the local engine gives the same bits in any company")
        if self.model.startswith("version:") and self.store is None:
            raise ValueError(f"model: {self.model} needs a store")
        return self

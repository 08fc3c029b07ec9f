"""Settings of the generator server."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab.generator.engine import SwapMode
from trimtab.runtime.config import ServiceConfig


class GeneratorConfig(ServiceConfig):
    """One generator process: a policy, how it is batched, and how it follows new versions."""

    port: int = Field(default=7101, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9101, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

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
    self_check: bool = Field(default=True, description="Compare cached decoding with full forwards before serving.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.follow is not None and self.store is None:
            raise ValueError("follow: needs a store to follow a pointer in")
        if self.model.startswith("version:") and self.store is None:
            raise ValueError(f"model: {self.model} needs a store")
        return self

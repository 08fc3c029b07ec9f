"""Settings of the reference server."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab.runtime.config import ServiceConfig


class ReferenceConfig(ServiceConfig):
    """One reference process: a frozen policy and how its sequences are batched. It follows nothing."""

    port: int = Field(default=7103, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9103, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

    model: str = Field(min_length=1, description="Folder, Hugging Face id or version:RUN/NAME[@STEP].")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What the model runs in.")
    max_length: int | None = Field(default=None, ge=2, description="Longest sequence, tokens; empty: the model's own.")
    batch_tokens: int = Field(default=16_384, ge=1, description="Most tokens of one packed forward.")
    self_check: bool = Field(default=True, description="Compare the kernels with plain torch before serving.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.model.startswith("version:") and self.store is None:
            raise ValueError(f"model: {self.model} needs a store")
        return self

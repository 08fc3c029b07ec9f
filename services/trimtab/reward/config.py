"""Settings of the reward server."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trimtab.runtime.config import ServiceConfig


class RewardConfig(ServiceConfig):
    """One reward process: a scalar model, how its texts are encoded and batched, and which pointer it follows."""

    port: int = Field(default=7102, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9102, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

    model: str = Field(min_length=1, description="Folder, Hugging Face id or version:RUN/NAME[@STEP].")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What the model runs in.")
    follow: str | None = Field(default=None, description="RUN/NAME in the store whose pointer is followed.")
    poll_interval_s: float = Field(default=2.0, gt=0, description="How often the followed pointer is read.")

    max_length: int | None = Field(default=None, ge=1, description="Longest sequence, tokens; empty: the model's own.")
    batch_tokens: int = Field(default=16_384, ge=1, description="Most tokens of one packed forward.")
    deterministic: bool = Field(
        default=False, description="A forward for each sequence: scores are bitwise the same in any company."
    )
    text_encoding: Literal["auto", "trained", "plain"] = Field(
        default="auto",
        description="trained: as the reward stage encodes its rankings, with an end token behind the response; "
        "plain: the text as it is; auto: trained for models that the reward stage made, plain for others.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.follow is not None and self.store is None:
            raise ValueError("follow: needs a store to follow a pointer in")
        if self.model.startswith("version:") and self.store is None:
            raise ValueError(f"model: {self.model} needs a store")
        return self

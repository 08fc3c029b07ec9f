"""What a reward server's scorers can be: reward models, rules in Python, weighted sums of both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(_Settings):
    """A reward model: where it comes from, what it runs in, how texts become its tokens."""

    kind: Literal["model"] = "model"
    model: str = Field(min_length=1, description="Folder, Hugging Face id or version:RUN/NAME[@STEP].")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What the model runs in.")
    follow: str | None = Field(default=None, description="RUN/NAME in the store whose pointer is followed.")
    poll_interval_s: float = Field(default=2.0, gt=0, description="How often the followed pointer is read.")
    max_length: int | None = Field(default=None, ge=1, description="Longest sequence, tokens; empty: the model's own.")
    batch_tokens: int = Field(default=16_384, ge=1, description="Most tokens of one packed forward.")
    deterministic: bool = Field(
        default=False, description="A forward for each sequence: scores are bitwise the same in any company."
    )
    own_process: bool = Field(
        default=False,
        description="The model computes in a process of its own, so that reading requests and computing do not take "
        "turns: more scores a second from small models and small requests, for one more process's memory.",
    )
    text_encoding: Literal["auto", "trained", "plain"] = Field(
        default="auto",
        description="trained: as the reward stage encodes its rankings, with an end token behind the response; "
        "plain: the text as it is; auto: trained for models that the reward stage made, plain for others.",
    )
    timeout_s: float = Field(default=60.0, gt=0, description="A call that takes longer here is given up.")
    queue_limit: int = Field(default=4096, ge=1, description="Most sequences that may wait for this model.")


class RuleSettings(_Settings):
    """What all rules share. A rule runs in processes of its own, which are killed where they take too long."""

    timeout_s: float = Field(default=1.0, gt=0, description="Most seconds for one response, then its process ends.")
    queue_limit: int = Field(default=4096, ge=1, description="Most responses that may wait for this rule.")
    processes: int = Field(default=1, ge=1, le=64, description="Processes that the rule runs in.")


class LengthSettings(RuleSettings):
    """How long the response is; with bounds, 1 inside of them and 0 outside."""

    kind: Literal["length"]
    unit: Literal["characters", "words"] = "words"
    at_least: int | None = Field(default=None, ge=0)
    at_most: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> LengthSettings:
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least: {self.at_least} is above at_most {self.at_most}")
        return self


class RegexSettings(RuleSettings):
    """1 where the pattern matches the response and 0 where not; with `count`, how often it occurs."""

    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    match: Literal["anywhere", "whole", "count"] = "anywhere"
    ignore_case: bool = False
    dot_matches_newline: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return pattern


class AnswerSettings(RuleSettings):
    """A verifier: `right` where the response's final answer equals the reference, else `wrong`."""

    kind: Literal["answer"]
    pattern: str | None = Field(
        default=None, description="Its last match's first group is the answer; empty: \\boxed{}, ####, else a number."
    )
    right: float = Field(default=1.0, allow_inf_nan=False)
    wrong: float = Field(default=0.0, allow_inf_nan=False)

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
            if groups < 1:
                raise ValueError(f"{pattern!r} has no group; put the answer in parentheses")
        return pattern


class FunctionSettings(RuleSettings):
    """A function of yours, `module:name`, that takes any of prompt, response, reference and messages."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    folder: Path | None = Field(default=None, description="Where its module lies; empty: wherever Python finds it.")
    needs_reference: bool = False


class SumSettings(_Settings):
    """Σ weight · score of other scorers, each normalised by its own mean and deviation unless `of: raw`."""

    kind: Literal["sum"]
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1)
    of: Literal["normalized", "raw"] = "normalized"
    timeout_s: float = Field(default=60.0, gt=0, description="A call that takes longer here is given up.")


AnyRule = LengthSettings | RegexSettings | AnswerSettings | FunctionSettings
ScorerSettings = Annotated[ModelSettings | AnyRule | SumSettings, Field(discriminator="kind")]

"""What OpenAI's two generation routes share: sampling parameters in its words, usage, log-probs.

Parameters that the generator does not have are refused unless they stand at their neutral value; none is passed over
in silence. Beside OpenAI's own there are vLLM's names for the rest (`top_k`, `min_tokens`, `ignore_eos`,
`stop_token_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from trimtab.gateway.schemas import SEEDS, Body, TokenId
from trimtab_client import Completion, ModelVersion, Sampling

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
MOST_TOKENS = 2**20


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingFields(Body):
    """The parameters of both routes."""

    model: str = Field(max_length=256, examples=["policy"], description="A name of /v1/models.")
    n: int | None = Field(default=None, ge=1, le=4096)
    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    presence_penalty: Literal[0] | None = Field(default=None, description="Only 0.")
    frequency_penalty: Literal[0] | None = Field(default=None, description="Only 0.")
    user: str | None = Field(default=None, description="Not used.")
    metadata: dict[str, Any] | None = Field(default=None, description="Not used.")

    def sampling(self, max_tokens: int | None) -> Sampling:
        """As the SDK takes it."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            n=self.n or 1,
            max_tokens=max_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            seed=None if self.seed is None else self.seed % SEEDS,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage


class Usage(BaseModel):
    """Tokens of a request; each prompt counts once, however many its samples."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class UsageCount:
    """Adds completions up."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._completion_tokens = 0

    def add(self, completion: Completion) -> None:
        """Count one completion."""
        self._prompts[completion.prompt_index] = len(completion.prompt_token_ids)
        self._completion_tokens += len(completion.token_ids)

    def usage(self) -> Usage:
        """The sum."""
        prompts, completions = sum(self._prompts.values()), self._completion_tokens
        return Usage(prompt_tokens=prompts, completion_tokens=completions, total_tokens=prompts + completions)


def fingerprint(completions: Sequence[Completion]) -> str | None:
    """The version that sampled the last token of the last completion: what `system_fingerprint` says."""
    runs = completions[-1].versions if completions else ()
    return _name(runs[-1].version) if runs else None


def token_names(completion: Completion) -> list[str]:
    """The gateway has no tokenizer: tokens are named by their ids, in vLLM's form."""
    return [f"token_id:{token}" for token in completion.token_ids.tolist()]


def _name(version: ModelVersion) -> str:
    return f"{version} {version.digest}".strip()

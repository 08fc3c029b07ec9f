"""The life of one sequence in vLLM: from a request of the service to its outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from vllm.inputs import tokens_input  # type: ignore[import-not-found]

from trimtab.generator.engine import (
    FailedSequence,
    FailureReason,
    FinishedSequence,
    FinishReason,
    Outcome,
    SequenceRequest,
    TokenRun,
)
from trimtab.generator.local.stop_strings import StopStrings, response_text
from trimtab.generator.vllm.sampling import BROKEN, sampling_params
from trimtab_client.versions import ModelVersion

NON_FINITE = "the model gave logits that are not finite numbers; the weights of this version are broken"


@dataclass
class Sampled:
    """Tokens as they came, and vLLM's spans of weight labels once it is known where they end."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: Sequence[Any] = ()
    reason: str | None = None

    def add(self, completion: Any) -> None:
        self.token_ids.extend(completion.token_ids)
        self.logprobs.extend(completion.logprobs.logprobs if completion.logprobs else ())
        self.reason = completion.finish_reason
        if completion.weight_versions:
            self.spans = completion.weight_versions


class SequenceSampler:
    """Samples sequences with one `AsyncLLM`.

    Args:
        versions: the version that each weight label of vLLM's stands for; grows while it serves.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_ids: Sequence[int],
        max_length: int,
        versions: Mapping[str, ModelVersion],
    ) -> None:
        self._llm = llm
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._max_length = max_length
        self._versions = versions

    async def sample(self, request: SequenceRequest, label: str) -> Outcome:
        """Sample a sequence to its end. `label` is that of now: prompts are shared among requests with the same one."""
        sampling, prompt = request.sampling, request.prompt_ids
        limit = min(sampling.max_tokens, self._max_length - len(prompt))
        stops = StopStrings(self._tokenizer, sampling.stop, prompt) if sampling.stop else None
        params = sampling_params(
            sampling,
            seed=request.seed,
            end_token_ids=self._end_token_ids,
            max_tokens=limit,
            stream=stops is not None,
        )
        name = str(request.sequence_id)
        outputs = self._llm.generate(tokens_input(prompt.tolist(), cache_salt=label), params, name)
        sampled, stopped_at = Sampled(), None
        async for output in outputs:
            before = len(sampled.token_ids)
            sampled.add(output.outputs[0])
            if stops is not None and stopped_at is None:
                stopped_at = _watch(stops, sampled.token_ids, before, sampling.min_tokens)
                if stopped_at is not None and not output.finished:
                    # It then says which weights sampled which tokens, as it does at every end.
                    await self._llm.abort(name)
        return self._outcome(request, sampled, stopped_at)

    def _outcome(self, request: SequenceRequest, sampled: Sampled, stopped_at: int | None) -> Outcome:
        sequence_id, reason = request.sequence_id, sampled.reason
        if stopped_at is None and reason not in ("stop", "length"):
            return FailedSequence(sequence_id, FailureReason.BROKEN, f"vLLM gave the sequence up ({reason})")
        count = len(sampled.token_ids) if stopped_at is None else stopped_at
        logprobs = np.array(sampled.logprobs[:count], np.float32)
        if len(logprobs) != count or (logprobs == BROKEN).any():
            return FailedSequence(sequence_id, FailureReason.BROKEN, NON_FINITE)
        token_ids = np.array(sampled.token_ids[:count], np.int32)
        stopped = stopped_at is not None or reason == "stop"
        return FinishedSequence(
            sequence_id=sequence_id,
            token_ids=token_ids,
            logprobs=logprobs,
            text=response_text(
                self._tokenizer, request.prompt_ids, token_ids, request.sampling.stop if stopped else ()
            ),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            runs=self._runs(sampled.spans, count),
        )

    def _runs(self, spans: Sequence[Any], count: int) -> tuple[TokenRun, ...]:
        """Which version sampled which of the first `count` tokens."""
        lengths = [(self._versions[span.version], min(span.end, count) - span.start) for span in spans]
        return tuple(TokenRun(version, length) for version, length in lengths if length > 0)


def _watch(stops: StopStrings, token_ids: Sequence[int], start: int, min_tokens: int) -> int | None:
    """How many tokens there are up to the first from `start` on that completes a stop string, or None."""
    for count in range(start + 1, len(token_ids) + 1):
        if stops.push(np.array(token_ids[:count], np.int32)) and count >= min_tokens:
            return count
    return None

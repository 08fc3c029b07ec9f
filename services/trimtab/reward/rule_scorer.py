"""A rule by name: a request's sequences as texts, each to the processes of `rule_runner`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from blake3 import blake3

from trimtab.models.scalar_head import ScalarModel
from trimtab.models.tokenizers import decode, decode_continuation
from trimtab.reward.forward_messages import ModelFacts
from trimtab.reward.rule_runner import RuleRunner
from trimtab.reward.rules import Response
from trimtab.reward.scorer_config import AnswerSettings, AnyRule, FunctionSettings
from trimtab.reward.scorers import Scored, check_pin
from trimtab.reward.sequences import messages_of
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import invalid
from trimtab.runtime.limits import check_batch_size, check_sequences, check_tokenizer_digest, read_tokens
from trimtab_client.v1 import model_pb2, reward_pb2
from trimtab_client.versions import ModelVersion

RUN_AS_LONG_AS_IT_TAKES = {"timeout_s", "queue_limit", "processes"}
"""Settings that change when a rule answers and never what; the digest of its version leaves them out."""


class RuleScorer:
    """A rule behind the same API as a model. Its score has mean 0 and deviation 1: normalised is raw.

    `models` gives what the server serves now; token ids are decoded by the tokenizer of one of them.
    """

    def __init__(
        self,
        name: str,
        settings: AnyRule,
        limits: RequestLimits,
        models: Callable[[], Sequence[ScalarModel | ModelFacts]],
    ) -> None:
        self.name = name
        self.kind = settings.kind
        self.version = ModelVersion("", name, 0, _digest(settings))
        self.needs_reference = isinstance(settings, AnswerSettings) or (
            isinstance(settings, FunctionSettings) and settings.needs_reference
        )
        self._settings = settings
        self._limits = limits
        self._models = models
        self.runner = RuleRunner(
            name,
            settings.model_dump(mode="json"),
            timeout_s=settings.timeout_s,
            queue_limit=settings.queue_limit,
            processes=settings.processes,
        )

    async def score(
        self, request: reward_pb2.ScoreRequest, pin: model_pb2.VersionPin | None, deadline: float | None
    ) -> Scored:
        """Score each response by the rule; `truncate` and `deterministic` change nothing here."""
        check_pin(pin, self.version)
        items = await self._responses(request)
        scores_B = np.asarray(await self.runner.score(items, deadline), dtype=np.float32)
        return Scored(scores_B, scores_B, self.version)

    def info(self) -> model_pb2.ScorerInfo:
        digests = {model.tokenizer_digest for model in self._models()}
        return model_pb2.ScorerInfo(
            name=self.name,
            kind=self.kind,
            version=self.version.to_proto(),
            tokenizer_digest=digests.pop() if len(digests) == 1 else "",
            needs_reference=self.needs_reference,
            timeout_s=self._settings.timeout_s,
        )

    async def _responses(self, request: reward_pb2.ScoreRequest) -> list[Response]:
        kind = request.WhichOneof("input")
        if kind == "texts":
            check_batch_size(len(request.texts.items), self._limits, field="texts.items")
            for index, item in enumerate(request.texts.items):
                self._check_reference(item.reference, f"texts.items[{index}].reference")
            return [Response(item.prompt, item.response, item.reference) for item in request.texts.items]
        if kind == "conversations":
            return self._of_conversations(request.conversations)
        if kind == "tokens":
            return await asyncio.to_thread(self._of_tokens, request.tokens)
        raise invalid("input", "one of tokens, texts or conversations is required")

    def _of_conversations(self, batch: reward_pb2.ConversationBatch) -> list[Response]:
        field = "conversations.conversations"
        check_batch_size(len(batch.conversations), self._limits, field=field)
        references = self._references(batch.references, len(batch.conversations), "conversations.references")
        found = []
        for index, (conversation, reference) in enumerate(zip(batch.conversations, references, strict=True)):
            messages = messages_of(conversation)
            if not messages:
                raise invalid(f"{field}[{index}].messages", "a conversation has at least one message")
            prompt = "\n".join(message["content"] for message in messages[:-1])
            found.append(Response(prompt, messages[-1]["content"], reference, messages))
        return found

    def _of_tokens(self, batch: reward_pb2.TokenBatch) -> list[Response]:
        tokens = read_tokens(batch.tokens, self._limits, field="tokens.tokens")
        models = {model.tokenizer_digest: model for model in self._models()}
        if not models:
            raise invalid("tokens", f"scorer {self.name} reads text and this server has no tokenizer; send text")
        served = batch.tokenizer_digest if batch.tokenizer_digest in models else next(iter(models))
        check_tokenizer_digest(batch.tokenizer_digest, served, field="tokens.tokenizer_digest")
        model = models[served]
        check_sequences(tokens, self._limits, model.vocab_size, self._limits.max_tokens, field="tokens.tokens")
        references = self._references(batch.references, tokens.batch_size, "tokens.references")
        prompts_B = tokens.prompt_lengths if tokens.prompt_lengths is not None else np.zeros(tokens.batch_size, int)
        return [
            Response(
                decode(model.tokenizer, ids[:length]),
                decode_continuation(model.tokenizer, ids[:length], ids[length:]),
                reference,
            )
            for ids, length, reference in zip(tokens.sequences(), prompts_B.tolist(), references, strict=True)
        ]

    def _references(self, given: Sequence[str], count: int, field: str) -> list[str]:
        if given and len(given) != count:
            raise invalid(field, f"{len(given)} references for {count} sequences")
        found = list(given) or [""] * count
        for index, reference in enumerate(found):
            self._check_reference(reference, f"{field}[{index}]" if given else field)
        return found

    def _check_reference(self, reference: str, field: str) -> None:
        if self.needs_reference and not reference:
            raise invalid(field, f"required by scorer {self.name}: what the response is compared with")


def _digest(settings: AnyRule) -> str:
    return "blake3:" + blake3(settings.model_dump_json(exclude=RUN_AS_LONG_AS_IT_TAKES).encode()).hexdigest()

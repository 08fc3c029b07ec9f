"""A weighted sum of other scorers by name: Σ weight · score, all parts at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
from blake3 import blake3

from trimtab.reward.model_scorer import ModelScorer
from trimtab.reward.rule_scorer import RuleScorer
from trimtab.reward.scorer_config import SumSettings
from trimtab.reward.scorers import Part, Scored, check_pin, within
from trimtab.runtime.errors import ServiceError, internal
from trimtab_client.v1 import model_pb2, reward_pb2
from trimtab_client.versions import ModelVersion


class SumScorer:
    """Parts keep their queues and time-outs; where one fails, the sum fails with its reason and its name.

    Its version's digest covers weights and the versions of all parts; a part that moves makes another version.
    """

    kind = "sum"

    def __init__(self, name: str, settings: SumSettings, parts: Mapping[str, ModelScorer | RuleScorer]) -> None:
        self.name = name
        self._settings = settings
        self._parts = {part: parts[part] for part in settings.weights}

    async def score(
        self, request: reward_pb2.ScoreRequest, pin: model_pb2.VersionPin | None, deadline: float | None
    ) -> Scored:
        """Score with every part; the sum in float64, rounded once."""
        async with within(self.name, self._settings.timeout_s, deadline) as until:
            tasks = [asyncio.ensure_future(_of_part(part, request, until)) for part in self._parts.values()]
            try:
                found = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        version = self._version([scored.version for scored in found])
        check_pin(pin, version)
        parts = tuple(self._part(name, scored) for name, scored in zip(self._parts, found, strict=True))
        with np.errstate(over="ignore", invalid="ignore"):
            total_B = sum(part.weight * part.scores_B.astype(np.float64) for part in parts)
            scores_B = np.asarray(total_B, dtype=np.float32)
        if not np.isfinite(scores_B).all():
            raise internal(f"scorer {self.name}: sequence {int(np.argmin(np.isfinite(scores_B)))} adds up to no number")
        cut = tuple(sorted({index for scored in found for index in scored.cut}))
        return Scored(scores_B, scores_B, version, cut, parts)

    def info(self) -> model_pb2.ScorerInfo:
        parts = [part.info() for part in self._parts.values()]
        digests = {part.tokenizer_digest for part in parts}
        return model_pb2.ScorerInfo(
            name=self.name,
            kind=self.kind,
            version=self._version([ModelVersion.from_proto(part.version) for part in parts]).to_proto(),
            tokenizer_digest=digests.pop() if len(digests) == 1 else "",
            max_length=min((part.max_length for part in parts if part.max_length), default=0),
            needs_reference=any(part.needs_reference for part in parts),
            timeout_s=self._settings.timeout_s,
            weights=self._settings.weights,
        )

    def _part(self, name: str, scored: Scored) -> Part:
        used_B = scored.normalized_B if self._settings.of == "normalized" else scored.scores_B
        return Part(name, self._settings.weights[name], used_B, scored.version)

    def _version(self, versions: Sequence[ModelVersion]) -> ModelVersion:
        content = [self._settings.of]
        for (name, weight), version in zip(self._settings.weights.items(), versions, strict=True):
            content.append(f"{name} {weight!r} {version.run_id}/{version.name}@{version.step} {version.digest}")
        return ModelVersion("", self.name, 0, "blake3:" + blake3("\n".join(content).encode()).hexdigest())


async def _of_part(part: ModelScorer | RuleScorer, request: reward_pb2.ScoreRequest, until: float) -> Scored:
    try:
        return await part.score(request, None, until)
    except ServiceError as error:
        if part.name in error.message:
            raise
        raise ServiceError(
            error.code, f"scorer {part.name}: {error.message}", field=error.field, retry_after_s=error.retry_after_s
        ) from error

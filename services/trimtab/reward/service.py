"""RewardService and ModelService of a reward server: requests go to the scorer they name.

What a scorer does is its own file's matter; here they are loaded, listed and called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import grpc.aio

from trimtab.models.errors import ModelLoadError
from trimtab.models.scalar_head import ScalarModel
from trimtab.reward.config import RewardConfig
from trimtab.reward.forward_messages import ModelFacts
from trimtab.reward.model_scorer import ModelScorer
from trimtab.reward.rule_scorer import RuleScorer
from trimtab.reward.scorer_config import ModelSettings, SumSettings
from trimtab.reward.scorers import NamedScorer
from trimtab.reward.sum_scorer import SumScorer
from trimtab.runtime import model_service
from trimtab.runtime.calls import deadline_of
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import StartError, not_found, precondition
from trimtab.runtime.model_service import load_version
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab.weights.errors import StoreError
from trimtab.weights.store import open_store
from trimtab_client.ragged import encode_floats
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reward_pb2, reward_pb2_grpc

LABEL = "reward"
SERVICE_NAME = "trimtab.v1.RewardService"
SERVICES = (SERVICE_NAME, model_service.SERVICE_NAME)


def main(config: RewardConfig) -> int:
    """Serve until SIGTERM; the process's exit code."""
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Load every scorer; what `RunningServer` serves. Raises StartError where one cannot be used."""
    config = context.config
    assert isinstance(config, RewardConfig)
    try:
        scorers = await _load_scorers(config, context)
    except (StoreError, ModelLoadError) as error:
        raise StartError(str(error)) from error
    return [
        Service(SERVICE_NAME, reward_pb2_grpc.add_RewardServiceServicer_to_server, RewardServicer(scorers)),
        Service(
            model_service.SERVICE_NAME,
            model_pb2_grpc.add_ModelServiceServicer_to_server,
            RewardModelServicer(scorers, config.limits),
        ),
    ]


async def _load_scorers(config: RewardConfig, context: ServerContext) -> dict[str, NamedScorer]:
    store = await asyncio.to_thread(open_store, config.store) if config.store is not None else None
    settings = config.all_scorers()
    models: dict[str, ModelScorer] = {}
    rules: dict[str, RuleScorer] = {}

    def served_models() -> list[ScalarModel | ModelFacts]:
        return [scorer.served.current.model.model for scorer in models.values()]

    for name, wanted in settings.items():
        if isinstance(wanted, ModelSettings):
            models[name] = await ModelScorer.load(name, wanted, context, store)
        elif not isinstance(wanted, SumSettings):
            rules[name] = RuleScorer(name, wanted, config.limits, served_models)
            context.on_close(rules[name].runner.close)
    await asyncio.gather(*(rule.runner.start() for rule in rules.values()))
    parts = {**models, **rules}
    sums = {
        name: SumScorer(name, wanted, parts) for name, wanted in settings.items() if isinstance(wanted, SumSettings)
    }
    found: dict[str, NamedScorer] = {**parts, **sums}
    return {name: found[name] for name in settings}


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """trimtab.v1.RewardService."""

    def __init__(self, scorers: Mapping[str, NamedScorer]) -> None:
        self._scorers = scorers

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """Score a batch with the scorer that the request names."""
        scorer = named(self._scorers, request.scorer)
        pin = request.version if request.HasField("version") else None
        scored = await scorer.score(request, pin, deadline_of(context))
        return reward_pb2.ScoreResponse(
            scores=encode_floats(scored.scores_B),
            normalized_scores=encode_floats(scored.normalized_B),
            version=scored.version.to_proto(),
            truncated=scored.cut,
            scorer=scorer.name,
            parts=[
                reward_pb2.PartScores(
                    scorer=part.scorer,
                    weight=part.weight,
                    scores=encode_floats(part.scores_B),
                    version=part.version.to_proto(),
                )
                for part in scored.parts
            ],
        )


class RewardModelServicer(model_pb2_grpc.ModelServiceServicer):
    """trimtab.v1.ModelService over all scorers: GetModel describes the default one and lists them all."""

    def __init__(self, scorers: Mapping[str, NamedScorer], limits: RequestLimits) -> None:
        self._scorers = scorers
        self._limits = limits

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=self._info())

    async def LoadVersion(
        self, request: model_pb2.LoadVersionRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.LoadVersionResponse:
        scorer = named(self._scorers, request.scorer)
        if not isinstance(scorer, ModelScorer):
            raise precondition(f"scorer {scorer.name} is no model; name one that is", field="scorer")
        await load_version(scorer.served, request)
        return model_pb2.LoadVersionResponse(model=self._info())

    def _info(self) -> model_pb2.ModelInfo:
        default = next(iter(self._scorers.values()))
        listed = [scorer.info() for scorer in self._scorers.values()]
        info = model_pb2.ModelInfo(
            version=listed[0].version,
            tokenizer_digest=listed[0].tokenizer_digest,
            max_length=listed[0].max_length,
            max_sequences=self._limits.max_sequences,
            max_tokens=self._limits.max_tokens,
        )
        if isinstance(default, ModelScorer):
            info.CopyFrom(default.served.current.info)
        info.scorers.extend(listed)
        return info


def named(scorers: Mapping[str, NamedScorer], name: str) -> NamedScorer:
    """The scorer of that name, the default one for ""; NOT_FOUND naming those there are."""
    if not name:
        return next(iter(scorers.values()))
    if name not in scorers:
        shown = name if len(name) <= 64 else f"{name[:64]}…"
        raise not_found(f"scorer: {shown!r} is none of {', '.join(scorers)}", field="scorer")
    return scorers[name]

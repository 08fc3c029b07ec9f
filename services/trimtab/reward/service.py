"""RewardService: sequences in, one score each out, the same whatever else is in the batch.

It checks and encodes, queues in the runtime's batcher, and follows versions of the reward model while serving.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np

from trimtab.models.errors import ModelLoadError
from trimtab.models.scalar_head import ScalarModel
from trimtab.reward.config import RewardConfig
from trimtab.reward.scorer import Scorer, read_beside_running
from trimtab.runtime import model_service
from trimtab.runtime.batcher import Batcher
from trimtab.runtime.calls import deadline_of
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import StartError, internal, invalid, precondition
from trimtab.runtime.limits import (
    check_batch_size,
    check_lengths,
    check_sequences,
    check_tokenizer_digest,
    read_tokens,
)
from trimtab.runtime.model_service import ModelServicer, Served, ServedModel, describe, pinned
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import parse_reference, resolve_source
from trimtab.weights.store import Store, open_store
from trimtab.weights.watch import PointerWatcher
from trimtab_client.ragged import RaggedTokens, encode_floats
from trimtab_client.v1 import reward_pb2, reward_pb2_grpc, tokens_pb2
from trimtab_client.versions import ModelVersion

LABEL = "reward"
SERVICE_NAME = "trimtab.v1.RewardService"
SERVICES = (SERVICE_NAME, model_service.SERVICE_NAME)


def main(config: RewardConfig) -> int:
    """Serve until SIGTERM; the process's exit code."""
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Load the model and start to follow its pointer; what `RunningServer` serves.

    Raises StartError where the model or the store cannot be used.
    """
    config = context.config
    assert isinstance(config, RewardConfig)
    try:
        store = await asyncio.to_thread(open_store, config.store) if config.store is not None else None
        followed = parse_reference(config.follow) if config.follow is not None else None
        first = await context.worker.run(_load_first, config, store)
    except (StoreError, ModelLoadError) as error:
        raise StartError(str(error)) from error
    stager = Stager(context, config, store) if store is not None else None
    served = ServedModel(first, stage=stager.stage if stager is not None else None, metrics=context.metrics)
    if store is not None and followed is not None:
        watcher = PointerWatcher(store, followed.run_id, followed.name, config.poll_interval_s, seen=first.version)
        context.background(served.follow(_versions(watcher)), name="reward-follow")
    batcher = Batcher(
        score_items,
        context.worker,
        max_tokens_per_batch=config.batch_tokens,
        queue_limit=config.queue_limit,
        metrics=context.metrics,
    )
    context.on_close(batcher.close)
    servicer = RewardServicer(served, batcher, config.limits)
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    return [Service(SERVICE_NAME, add, servicer), ModelServicer(served).as_service()]


class Stager:
    """Makes a published version servable beside the one that is served."""

    def __init__(self, context: ServerContext, config: RewardConfig, store: Store) -> None:
        self._worker = context.worker
        self._config = config
        self._store = store

    async def stage(self, version: ModelVersion) -> Served[Scorer]:
        """Fetch, verify, load and try it. Raises StoreError or ModelLoadError; the old version then stays."""
        served = await asyncio.to_thread(self._read, version)
        await self._worker.run(served.model.check)
        return served

    def _read(self, version: ModelVersion) -> Served[Scorer]:
        manifest = self._store.get(version.run_id, version.name, version.step)
        if version.digest not in ("", manifest.version.digest):
            raise precondition(
                f"{version} has digest {manifest.version.digest} in the store, not {version.digest}",
                field="version.digest",
            )
        folder = str(self._store.fetch(manifest))
        model = read_beside_running(folder, dtype=self._config.dtype, device=self._config.device)
        return _served(model, manifest.version, self._config)


@dataclass(frozen=True)
class ScoreItem:
    """One sequence of one call, bound to the model that the call began with."""

    scorer: Scorer
    token_ids: np.ndarray
    position: int


def score_items(items: list[ScoreItem]) -> list[float | Exception]:
    """One packed forward for each model among the items (two while a swap is under way). Device thread only."""
    results: list[float | Exception] = [internal("the sequence was not scored")] * len(items)
    for scorer in {id(item.scorer): item.scorer for item in items}.values():
        mine = [index for index, item in enumerate(items) if item.scorer is scorer]
        scores_B = scorer.score([items[index].token_ids for index in mine])
        for index, score in zip(mine, scores_B.tolist(), strict=True):
            results[index] = score if np.isfinite(score) else _not_finite(items[index].position, score)
    return results


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """trimtab.v1.RewardService."""

    def __init__(self, served: ServedModel[Scorer], batcher: Batcher[ScoreItem, float], limits: RequestLimits) -> None:
        self._served = served
        self._batcher = batcher
        self._limits = limits

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """Score a batch with one version, the one served when the call began (or the pinned one)."""
        served = await pinned(self._served, request.version, context)
        scorer = served.model
        sequences = await self._sequences(request, scorer)
        cut = [index for index, ids in enumerate(sequences) if len(ids) > scorer.max_length]
        items = [ScoreItem(scorer, ids[: scorer.max_length], index) for index, ids in enumerate(sequences)]
        sizes = [len(item.token_ids) for item in items]
        scores_B = np.asarray(await self._batcher.submit_all(items, sizes, deadline_of(context)), dtype=np.float32)
        normalized_B = scorer.normalized(scores_B)
        if not np.isfinite(normalized_B).all():
            position = int(np.argmin(np.isfinite(normalized_B)))
            raise _not_finite(position, float(normalized_B[position]))
        return reward_pb2.ScoreResponse(
            scores=encode_floats(scores_B),
            normalized_scores=encode_floats(normalized_B),
            version=served.version.to_proto(),
            truncated=cut,
        )

    async def _sequences(self, request: reward_pb2.ScoreRequest, scorer: Scorer) -> list[np.ndarray]:
        """The checked sequences of any of the three inputs; longer than the model only where `truncate` allows it."""
        kind = request.WhichOneof("input")
        if kind == "tokens":
            return self._token_batch(request.tokens, scorer, allow_longer=request.truncate)
        if kind == "texts":
            check_batch_size(len(request.texts.items), self._limits, field="texts.items")
            sequences = await asyncio.to_thread(_encode_texts, request.texts, scorer)
        elif kind == "conversations":
            check_batch_size(
                len(request.conversations.conversations), self._limits, field="conversations.conversations"
            )
            sequences = await asyncio.to_thread(_encode_conversations, request.conversations, scorer)
        else:
            raise invalid("input", "one of tokens, texts or conversations is required")
        field = "texts.items" if kind == "texts" else "conversations.conversations"
        lengths_B = np.asarray([len(ids) for ids in sequences])
        check_lengths(lengths_B, self._limits, scorer.max_length, field=field, allow_longer=request.truncate)
        return sequences

    def _token_batch(self, batch: reward_pb2.TokenBatch, scorer: Scorer, *, allow_longer: bool) -> list[np.ndarray]:
        tokens: RaggedTokens = read_tokens(batch.tokens, field="tokens.tokens")
        check_tokenizer_digest(batch.tokenizer_digest, scorer.model.tokenizer_digest, field="tokens.tokenizer_digest")
        check_sequences(
            tokens,
            self._limits,
            scorer.model.vocab_size,
            scorer.max_length,
            field="tokens.tokens",
            allow_longer=allow_longer,
        )
        return tokens.sequences()


def _load_first(config: RewardConfig, store: Store | None) -> Served[Scorer]:
    source = resolve_source(config.model, store)
    served = _served(
        ScalarModel.load(source.path_or_id, dtype=config.dtype, device=config.device), source.version, config
    )
    served.model.check()
    return served


def _served(model: ScalarModel, version: ModelVersion, config: RewardConfig) -> Served[Scorer]:
    scorer = Scorer(
        model,
        max_length=config.max_length,
        text_encoding=config.text_encoding,
        deterministic=config.deterministic,
    )
    info = describe(model, version, max_length=scorer.max_length, limits=config.limits)
    return Served(version, scorer, info)


def _encode_texts(batch: reward_pb2.TextBatch, scorer: Scorer) -> list[np.ndarray]:
    return [scorer.encode_pair(item.prompt, item.response) for item in batch.items]


def _encode_conversations(batch: reward_pb2.ConversationBatch, scorer: Scorer) -> list[np.ndarray]:
    sequences = []
    for index, conversation in enumerate(batch.conversations):
        try:
            sequences.append(scorer.encode_conversation(_messages(conversation)))
        except ValueError as error:
            raise invalid(f"conversations.conversations[{index}]", str(error)) from error
    return sequences


def _messages(conversation: tokens_pb2.Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _not_finite(position: int, score: float) -> Exception:
    return internal(f"sequence {position} scores {score}: the model's weights or its dtype are at fault, not the text")


async def _versions(watcher: PointerWatcher) -> AsyncIterator[ModelVersion]:
    async for manifest in watcher:
        yield manifest.version

"""A reward model by name: its requests checked and encoded, its own queue and thread, the versions it follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from trimtab.models.scalar_head import ScalarModel
from trimtab.reward.forward import Forward, ModelForward, read_beside_running
from trimtab.reward.forward_messages import ModelFacts, Order
from trimtab.reward.forward_runner import ProcessForward
from trimtab.reward.scorer import Scorer
from trimtab.reward.scorer_config import ModelSettings
from trimtab.reward.scorers import Scored, within
from trimtab.reward.sequences import read_sequences
from trimtab.runtime.batcher import Batcher
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import internal, precondition
from trimtab.runtime.model_service import Served, ServedModel, describe
from trimtab.runtime.server import ServerContext
from trimtab.weights.sources import parse_reference, resolve_source
from trimtab.weights.store import Store
from trimtab.weights.watch import PointerWatcher
from trimtab_client.v1 import model_pb2, reward_pb2
from trimtab_client.versions import ModelVersion


@dataclass(frozen=True, eq=False, slots=True)
class ScoreItem:
    """One sequence of one call, bound to the model that the call began with."""

    scorer: Scorer
    token_ids: np.ndarray
    position: int
    alone: bool


def score_items(items: list[ScoreItem]) -> list[float | Exception]:
    """One packed forward for each model among the items (two while a swap is under way). Device thread only."""
    results: list[float | Exception] = [internal("the sequence was not scored")] * len(items)
    for scorer, alone in {(item.scorer, item.alone) for item in items}:
        mine = [index for index, item in enumerate(items) if item.scorer is scorer and item.alone == alone]
        scores_B = scorer.forward.score([items[index].token_ids for index in mine], alone=alone)
        for index, score in zip(mine, scores_B.tolist(), strict=True):
            results[index] = score if np.isfinite(score) else _not_finite(items[index].position, score)
    return results


class ModelScorer:
    """One `ServedModel` behind one `Batcher`. Made by `load`."""

    kind = "model"

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        served: ServedModel[Scorer],
        batcher: Batcher[ScoreItem, float],
        limits: RequestLimits,
    ) -> None:
        self.name = name
        self.served = served
        self._settings = settings
        self._batcher = batcher
        self._limits = limits

    @classmethod
    async def load(cls, name: str, settings: ModelSettings, context: ServerContext, store: Store | None) -> ModelScorer:
        """Load the model and follow its pointer. Raises ModelLoadError or StoreError where it cannot be used."""
        worker = context.new_worker(name)
        metrics = context.metrics if worker is context.worker else None  # the step that is shown is the first model's
        stager = Stager(worker, settings, context, store)
        followed = parse_reference(settings.follow) if settings.follow is not None else None
        first = await stager.first()
        served = ServedModel(first, stage=stager.stage if store is not None else None, metrics=metrics)
        if store is not None and followed is not None:
            watcher = PointerWatcher(
                store, followed.run_id, followed.name, settings.poll_interval_s, seen=first.version
            )
            context.background(served.follow(_versions(watcher)), name=f"{name}-follow")
        batcher = Batcher(
            score_items,
            worker,
            max_tokens_per_batch=settings.batch_tokens,
            queue_limit=settings.queue_limit,
            metrics=context.metrics,
        )
        scorer = cls(name, settings, served, batcher, context.config.limits)
        context.on_close(scorer.close)
        return scorer

    async def score(
        self, request: reward_pb2.ScoreRequest, pin: model_pb2.VersionPin | None, deadline: float | None
    ) -> Scored:
        """Score with one version, the one served when the call began (or the pinned one)."""
        async with within(self.name, self._settings.timeout_s, deadline) as until:
            served = await self.served.wait_for(pin, until)
            scorer = served.model
            self._batcher.check_room(1)  # a full queue refuses before texts are encoded
            sequences = await read_sequences(request, scorer, self._limits)
            longest = scorer.max_length
            cut = tuple(index for index, ids in enumerate(sequences) if len(ids) > longest)
            alone = request.deterministic or scorer.deterministic
            items = [ScoreItem(scorer, ids[:longest], index, alone) for index, ids in enumerate(sequences)]
            sizes = [len(item.token_ids) for item in items]
            scores_B = np.asarray(await self._batcher.submit_all(items, sizes, until), dtype=np.float32)
        normalized_B = scorer.normalized(scores_B)
        if not np.isfinite(normalized_B).all():
            position = int(np.argmin(np.isfinite(normalized_B)))
            raise _not_finite(position, float(normalized_B[position]))
        return Scored(scores_B, normalized_B, served.version, cut)

    async def close(self) -> None:
        """Refuse new work, let the running batch end, and end what computes elsewhere."""
        await self._batcher.close()
        await self.served.current.model.forward.close()

    def info(self) -> model_pb2.ScorerInfo:
        now = self.served.current
        return model_pb2.ScorerInfo(
            name=self.name,
            kind=self.kind,
            version=now.version.to_proto(),
            tokenizer_digest=now.info.tokenizer_digest,
            max_length=now.info.max_length,
            timeout_s=self._settings.timeout_s,
        )


class Stager:
    """Makes a model of settings servable: the first one at start, published versions beside the one that is served."""

    def __init__(
        self, worker: DeviceWorker, settings: ModelSettings, context: ServerContext, store: Store | None
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._context = context
        self._store = store

    async def first(self) -> Served[Scorer]:
        """What the settings name. Raises StoreError or ModelLoadError."""
        source = await asyncio.to_thread(resolve_source, self._settings.model, self._store)
        if self._settings.own_process:
            return await self._checked(*await self._start(source.path_or_id), source.version)
        options = {"dtype": self._settings.dtype, "device": self._context.config.device}
        model = await self._worker.run(ScalarModel.load, source.path_or_id, **options)
        return await self._checked(model, await self._worker.run(ModelForward, model), source.version)

    async def stage(self, version: ModelVersion) -> Served[Scorer]:
        """Fetch, verify, load and try it. Raises StoreError or ModelLoadError; the old version then stays."""
        folder, whole = await asyncio.to_thread(self._fetch, version)
        if self._settings.own_process:
            return await self._checked(*await self._start(folder), whole)
        options = {"dtype": self._settings.dtype, "device": self._context.config.device}
        model = await asyncio.to_thread(read_beside_running, folder, **options)
        return await self._checked(model, await asyncio.to_thread(ModelForward, model), whole)

    def _fetch(self, version: ModelVersion) -> tuple[str, ModelVersion]:
        """The folder of a version and its full name."""
        assert self._store is not None
        manifest = self._store.get(version.run_id, version.name, version.step)
        if version.digest not in ("", manifest.version.digest):
            raise precondition(
                f"{version} has digest {manifest.version.digest} in the store, not {version.digest}",
                field="version.digest",
            )
        return str(self._store.fetch(manifest)), manifest.version

    async def _start(self, path_or_id: str) -> tuple[ModelFacts, ProcessForward]:
        config = self._context.config
        order = Order(
            path_or_id, self._settings.dtype, config.device, config.threads, config.log_level, config.log_format
        )
        return await ProcessForward.start(order, self._context)

    async def _checked(
        self, model: ScalarModel | ModelFacts, forward: Forward, version: ModelVersion
    ) -> Served[Scorer]:
        try:
            scorer = Scorer(
                model,
                forward,
                max_length=self._settings.max_length,
                text_encoding=self._settings.text_encoding,
                deterministic=self._settings.deterministic,
            )
            await self._worker.run(scorer.check)
        except BaseException:
            await forward.close()
            raise
        limits = self._context.config.limits
        return Served(version, scorer, describe(model, version, max_length=scorer.max_length, limits=limits))


def _not_finite(position: int, score: float) -> Exception:
    return internal(f"sequence {position} scores {score}: the model's weights or its dtype are at fault, not the text")


async def _versions(watcher: PointerWatcher) -> AsyncIterator[ModelVersion]:
    async for manifest in watcher:
        yield manifest.version

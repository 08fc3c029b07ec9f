"""Rollouts over the wire: as a completion arrives it goes to reward and reference at once.

What waits for a service while calls to all of its replicas are under way goes out together in the next call; the
services work at the same time as the generator, and the result is ordered by index. A service that is away is waited
for; what has come is kept. When which batch is asked for is `pipeline`'s matter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.models.tokenizers import decode
from trimtab.runtime import tracing
from trimtab.trainer.patience import Patience
from trimtab.trainer.ppo.batches import Batch, Request, StageClock
from trimtab.trainer.ppo.experience import Episode
from trimtab.trainer.ppo.generator_pool import GeneratorPool
from trimtab.trainer.ppo.prompts import completion_seed
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.stages import PpoConfig
from trimtab_client import (
    AsyncReferenceClient,
    AsyncRewardClient,
    ChannelOptions,
    Completion,
    FailedPrecondition,
    ModelInfo,
    ModelVersion,
    RaggedTokens,
    Sampling,
    Scores,
)

OTHER_REPLICA_RETRIES = 1
"""A call goes to the other addresses at once; beyond that `Patience` tries again, and says why."""


class RolloutClients:
    """The three services a PPO run calls; checked against the policy when opened.

    Attributes:
        generator: its replicas, and the version that they shall serve.
        reference_model: what the reference served when it was checked. With exact KL every call is pinned to it.
    """

    def __init__(
        self,
        config: PpoConfig,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str, str], None],
        services: ChannelOptions,
    ) -> None:
        """`say` is told which service is waited for, and why; `services` has the TLS and token for them."""
        self.config = config
        self.tokenizer = tokenizer
        self.timeout_s = config.service_timeout_s
        self.patience = Patience(self.timeout_s, say)
        options = replace(services, timeout_s=self.timeout_s, retries=OTHER_REPLICA_RETRIES)
        self.generator = GeneratorPool(config.generator_address, options, self.timeout_s, say)
        self.reward = AsyncRewardClient(config.reward_address, options)
        self.reference = AsyncReferenceClient(config.reference_address, options)
        self._names = {
            name: f"{name} at {getattr(config, f'{name}_address')}" for name in ("generator", "reward", "reference")
        }
        self.tokenizer_digest = ""
        self.reference_model: ModelInfo | None = None

    async def check(self, tokenizer_digest: str) -> None:
        """Refuse services whose tokenizer is not the policy's; the reward's may differ with score_text."""
        self.tokenizer_digest = tokenizer_digest
        clients = {"generator": self.generator.client, "reference": self.reference, "reward": self.reward}
        for name, client in clients.items():
            model = await self.patience.until_answered(self._names[name], client.get_model)
            digest = model.tokenizer_digest if name != "reward" else self._scorers_digest(model)
            foreign = digest != tokenizer_digest
            if foreign and not (name == "reward" and self.config.score_text):
                advice = "; set score_text: true to send it text" if name == "reward" else ""
                raise RunFailedError(f"{name}_address: its tokenizer is not the policy's{advice}")
            if name == "reference":
                self.reference_model = model

    def _scorers_digest(self, model: ModelInfo) -> str:
        """The tokenizer digest of the reward service's scorer that the config names."""
        digests = {scorer.name: scorer.tokenizer_digest for scorer in model.scorers}
        for setting in ("reward_scorer", "gold_scorer"):
            wanted = getattr(self.config, setting)
            if wanted and wanted not in digests:
                raise RunFailedError(f"{setting}: {wanted} is none of the service's: {', '.join(digests) or 'none'}")
        return digests.get(self.config.reward_scorer, model.tokenizer_digest)

    async def load_version(self, version: ModelVersion) -> None:
        """Make the generator serve a version; returns once it does."""
        self.generator.newest = version
        await self.patience.until_answered(self._names["generator"], self.generator.load)

    async def collect(self, batch: Batch, keep: Callable[[int, Episode], None]) -> None:
        """Sample, score and reference what a batch lacks; `keep` is given each episode that is complete."""
        to_score: asyncio.Queue[int | None] = asyncio.Queue()
        to_reference: asyncio.Queue[int | None] = asyncio.Queue()
        clocks, began_ns = batch.clocks, time.time_ns()
        samples: dict[int, Any] = {}  # spans, to be linked by what works on several at once

        def arrived(index: int, completion: Completion) -> None:
            batch.episodes[index] = Episode(completion)
            seen = {"trimtab.sample": index, "trimtab.seed": str(completion.seed)}
            samples[index] = tracing.mark("trainer", "sample", seen, began_ns)
            to_score.put_nowait(index)
            to_reference.put_nowait(index)

        async def generate() -> None:
            started = time.perf_counter()
            with tracing.span("trainer", "generate"):
                async with self.generator.kept_loaded():
                    await self.patience.until_answered(
                        self._names["generator"], lambda: self._generate(batch, arrived), lambda: len(batch.episodes)
                    )
            clocks.generate.ended_at = time.perf_counter()
            clocks.generate.busy_s = clocks.generate.ended_at - started
            to_score.put_nowait(None)
            to_reference.put_nowait(None)

        def working(what: str, indices: list[int]) -> AbstractContextManager[Any]:
            return tracing.span(
                "trainer", what, {"trimtab.samples": indices}, links=[samples.get(index) for index in indices]
            )

        async def score(indices: list[int]) -> None:
            episodes = [batch.episodes[i] for i in indices]
            with working("score", indices):
                await self.patience.until_answered(self._names["reward"], lambda: self._score(episodes))
            keep_complete(indices)

        async def reference(indices: list[int]) -> None:
            episodes = [batch.episodes[i] for i in indices]
            with working("reference", indices):
                await self.patience.until_answered(self._names["reference"], lambda: self._reference(episodes))
            keep_complete(indices)

        def keep_complete(indices: list[int]) -> None:
            for index in indices:
                if batch.episodes[index].complete:
                    keep(index, batch.episodes[index])

        try:
            with tracing.span("trainer", "rollouts", {"trimtab.step": batch.step}):
                batch.trace = tracing.current()
                async with asyncio.TaskGroup() as group:
                    group.create_task(generate())
                    group.create_task(_drain(to_score, score, clocks.score, self.reward.replicas))
                    group.create_task(_drain(to_reference, reference, clocks.reference, self.reference.replicas))
        except ExceptionGroup as failures:
            raise _first(failures) from None

    async def _generate(self, batch: Batch, arrived: Callable[[int, Completion], None]) -> None:
        """Ask once for what the batch lacks, of the newest version and no other.

        With staleness a newer one may come to be served before the call is there: then that one is asked.
        """
        while requests := batch.missing():
            newest = self.generator.newest
            assert newest is not None, "load_version first"
            try:
                for request in requests:
                    await self._sample(batch, request, newest, arrived)
            except FailedPrecondition:
                if self.generator.newest == newest:
                    raise

    async def _sample(
        self, batch: Batch, request: Request, version: ModelVersion, arrived: Callable[[int, Completion], None]
    ) -> None:
        """One call; each completion is handed to `arrived` under its index in the batch."""
        config = self.config
        stream = self.generator.client.generate(
            [batch.prompts[p] for p in request.prompts],
            sampling=Sampling(
                n=len(request.samples[0]),
                max_tokens=config.max_new_tokens,
                min_tokens=config.min_new_tokens,
                temperature=config.temperature,
                ignore_eos=config.ignore_eos,
            ),
            seeds=[
                [completion_seed(config.stage.seed, batch.step, p, k) for k in samples]
                for p, samples in zip(request.prompts, request.samples, strict=True)
            ],
            version=version,
            timeout_s=self.timeout_s,
        )
        async for completion in stream:
            if any(run.version.digest != version.digest for run in completion.versions):
                raise RunFailedError(f"the generator sampled with {completion.versions}, not with {version}")
            prompt = request.prompts[completion.prompt_index]
            sample = request.samples[completion.prompt_index][completion.sample_index]
            completion = replace(completion, prompt_index=prompt, sample_index=sample)
            arrived(prompt * batch.samples + sample, completion)

    async def _score(self, episodes: list[Episode]) -> None:
        gold = await self._score_texts(episodes, self.config.gold_scorer) if self.config.gold_scorer else None
        if self.config.score_text:
            scores = await self._score_texts(episodes, self.config.reward_scorer)
        else:
            tokens = RaggedTokens.from_sequences(
                [episode.token_ids for episode in episodes],
                prompt_lengths=[len(episode.completion.prompt_token_ids) for episode in episodes],
            )
            scores = await self.reward.score_tokens(
                tokens, self.tokenizer_digest, timeout_s=self.timeout_s, scorer=self.config.reward_scorer
            )
        if not all(np.isfinite(given.normalized_scores).all() for given in (scores, gold) if given is not None):
            raise RunFailedError(f"the reward service {self.config.reward_address} answered with a non-finite score")
        if gold is not None:
            for episode, judged in zip(episodes, gold.normalized_scores, strict=True):
                episode.gold_score = float(judged)
        for episode, raw, normalized in zip(episodes, scores.scores, scores.normalized_scores, strict=True):
            episode.score, episode.normalized_score = float(raw), float(normalized)

    async def _score_texts(self, episodes: list[Episode], scorer: str) -> Scores:
        completions = [episode.completion for episode in episodes]
        pairs = [(decode(self.tokenizer, c.prompt_token_ids), c.text) for c in completions]
        return await self.reward.score_texts(pairs, timeout_s=self.timeout_s, scorer=scorer)

    async def _reference(self, episodes: list[Episode]) -> None:
        tokens = RaggedTokens.from_sequences(
            [episode.token_ids for episode in episodes],
            prompt_lengths=[len(episode.completion.prompt_token_ids) for episode in episodes],
        )
        exact = self.config.exact_kl
        answer = await self.reference.logprobs(
            tokens,
            self.tokenizer_digest,
            temperature=self.config.temperature,
            hidden=exact,
            version=self.reference_model.version if exact and self.reference_model else None,
            timeout_s=self.timeout_s,
        )
        if not np.isfinite(answer.logprobs.values).all():
            raise RunFailedError(f"the reference service {self.config.reference_address} answered non-finite log-probs")
        for episode, logprobs in zip(episodes, answer.logprobs.split(), strict=True):
            episode.reference_logprobs = logprobs
        if answer.hidden is not None:
            parts = np.split(answer.hidden, np.cumsum(answer.logprobs.lengths)[:-1])
            for episode, hidden_RD in zip(episodes, parts, strict=True):
                episode.reference_hidden = hidden_RD

    async def close(self) -> None:
        """Close the channels."""
        await asyncio.gather(self.generator.close(), self.reward.close(), self.reference.close())


def _first(failure: Exception) -> Exception:
    while isinstance(failure, ExceptionGroup):
        failure = failure.exceptions[0]
    return failure


async def _drain(
    queue: asyncio.Queue[int | None], call: Callable[[list[int]], Awaitable[None]], clock: StageClock, replicas: int
) -> None:
    """Call with what waits, as many calls at once as there are replicas, until None ends the queue.

    A call takes its share of what waits: all of it where there is one replica.
    """

    async def lane() -> None:
        while (item := await queue.get()) is not None:
            indices, share = [item], -(-(queue.qsize() + 1) // replicas)
            while len(indices) < share and not queue.empty():
                if (item := queue.get_nowait()) is None:
                    queue.put_nowait(None)
                    break
                indices.append(item)
            with clock.working():
                await call(indices)
        queue.put_nowait(None)  # for the next lane

    async with asyncio.TaskGroup() as group:
        for _ in range(replicas):
            group.create_task(lane())
    clock.ended_at = time.perf_counter()

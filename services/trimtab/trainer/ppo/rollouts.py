"""Rollouts over the wire: as a completion arrives it goes to reward and reference at once.

What waits for a service while a call to it is under way goes out together in the next call; the services
work at the same time as the generator, and the result is ordered by index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.models.tokenizers import decode
from trimtab.trainer.ppo.experience import Episode
from trimtab.trainer.ppo.prompts import completion_seed
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.stages import PpoConfig
from trimtab_client import (
    AsyncGeneratorClient,
    AsyncReferenceClient,
    AsyncRewardClient,
    ChannelOptions,
    ModelInfo,
    ModelVersion,
    RaggedTokens,
    Sampling,
)

SERVICE_RETRIES = 30
"""A service that restarts is waited for: about two minutes, the longest delay between tries being 5 s."""


@dataclass
class StageClock:
    """Seconds in which a service had work of this step, and the seconds the step waited for it alone."""

    busy_s: float = 0.0
    waited_s: float = 0.0


@dataclass
class RolloutClocks:
    """One clock a service."""

    generate: StageClock = field(default_factory=StageClock)
    score: StageClock = field(default_factory=StageClock)
    reference: StageClock = field(default_factory=StageClock)


class RolloutClients:
    """The three services a PPO run calls; checked against the policy when opened.

    Attributes:
        reference_model: what the reference served when it was checked. With exact KL every call is pinned to it.
    """

    def __init__(self, config: PpoConfig, tokenizer: PreTrainedTokenizerBase, timeout_s: float = 600.0) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.timeout_s = timeout_s
        options = ChannelOptions(timeout_s=timeout_s, retries=SERVICE_RETRIES)
        self.generator = AsyncGeneratorClient(config.generator_address, options)
        self.reward = AsyncRewardClient(config.reward_address, options)
        self.reference = AsyncReferenceClient(config.reference_address, options)
        self.tokenizer_digest = ""
        self.reference_model: ModelInfo | None = None

    async def check(self, tokenizer_digest: str) -> None:
        """Refuse services whose tokenizer is not the policy's; the reward's may differ with score_text."""
        self.tokenizer_digest = tokenizer_digest
        for name, client in (("generator", self.generator), ("reference", self.reference), ("reward", self.reward)):
            model = await client.get_model()
            foreign = model.tokenizer_digest != tokenizer_digest
            if foreign and not (name == "reward" and self.config.score_text):
                advice = "; set score_text: true to send it text" if name == "reward" else ""
                raise RunFailedError(f"{name}_address: its tokenizer is not the policy's{advice}")
            if name == "reference":
                self.reference_model = model

    async def load_version(self, version: ModelVersion) -> None:
        """Make the generator serve a version; returns once it does."""
        await self.generator.load_version(version)

    async def collect(
        self, prompts: Sequence[np.ndarray], step: int, version: ModelVersion
    ) -> tuple[list[Episode], RolloutClocks]:
        """Sample, score and reference a step's episodes; `prompts` are ids, each sampled `samples_per_prompt` times."""
        config = self.config
        count = config.samples_per_prompt
        episodes: dict[int, Episode] = {}
        clocks = RolloutClocks()
        to_score: asyncio.Queue[int | None] = asyncio.Queue()
        to_reference: asyncio.Queue[int | None] = asyncio.Queue()
        sampling = Sampling(
            n=count,
            max_tokens=config.max_new_tokens,
            min_tokens=config.min_new_tokens,
            temperature=config.temperature,
            ignore_eos=config.ignore_eos,
        )
        seeds = [[completion_seed(config.stage.seed, step, i, k) for k in range(count)] for i in range(len(prompts))]

        async def generate() -> None:
            started = time.perf_counter()
            stream = self.generator.generate(
                list(prompts), sampling=sampling, seeds=seeds, version=version, timeout_s=self.timeout_s
            )
            async for completion in stream:
                if any(run.version.digest != version.digest for run in completion.versions):
                    raise RunFailedError(f"the generator sampled with {completion.versions}, not with {version}")
                index = completion.prompt_index * count + completion.sample_index
                episodes[index] = Episode(completion)
                to_score.put_nowait(index)
                to_reference.put_nowait(index)
            clocks.generate.busy_s = clocks.generate.waited_s = time.perf_counter() - started
            to_score.put_nowait(None)
            to_reference.put_nowait(None)

        async def score(indices: list[int]) -> None:
            await self._score([episodes[i] for i in indices])

        async def reference(indices: list[int]) -> None:
            await self._reference([episodes[i] for i in indices])

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(generate())
                group.create_task(_drain(to_score, score, clocks.score))
                group.create_task(_drain(to_reference, reference, clocks.reference))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [episodes[i] for i in range(len(prompts) * count)], clocks

    async def _score(self, episodes: list[Episode]) -> None:
        if self.config.score_text:
            completions = [episode.completion for episode in episodes]
            pairs = [(decode(self.tokenizer, c.prompt_token_ids), c.text) for c in completions]
            scores = await self.reward.score_texts(pairs, timeout_s=self.timeout_s)
        else:
            tokens = RaggedTokens.from_sequences([episode.token_ids for episode in episodes])
            scores = await self.reward.score_tokens(tokens, self.tokenizer_digest, timeout_s=self.timeout_s)
        if not np.isfinite(scores.normalized_scores).all():
            raise RunFailedError(f"the reward service {self.config.reward_address} answered with a non-finite score")
        for episode, raw, normalized in zip(episodes, scores.scores, scores.normalized_scores, strict=True):
            episode.score, episode.normalized_score = float(raw), float(normalized)

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


async def _drain(
    queue: asyncio.Queue[int | None], call: Callable[[list[int]], Awaitable[None]], clock: StageClock
) -> None:
    """Call with all that waits, again and again, until None ends the queue."""
    ended_at: float | None = None
    while ended_at is None or not queue.empty():
        indices: list[int] = []
        item = await queue.get()
        while True:
            if item is None:
                ended_at = time.perf_counter()
            else:
                indices.append(item)
            if queue.empty():
                break
            item = queue.get_nowait()
        if indices:
            started = time.perf_counter()
            await call(indices)
            clock.busy_s += time.perf_counter() - started
    clock.waited_s = time.perf_counter() - ended_at

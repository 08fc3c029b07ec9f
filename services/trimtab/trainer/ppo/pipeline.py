"""The bounded pipeline of rollouts: which batches are asked for when, while the trainer trains on earlier ones.

Staleness is bounded by admission: the prompts of step t are sent once version t − 1 − `max_staleness` is served, so
nothing is ever too old to train on and nothing is dropped. Batches are trained in order. Each episode goes into the
journal as it comes; a batch that a killed run left whole is never asked for again, of another one only what is missing.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import numpy as np

from trimtab.trainer.journal import Journal
from trimtab.trainer.loop_thread import LoopThread
from trimtab.trainer.ppo.batches import Batch
from trimtab.trainer.ppo.episode_record import pack_episode, unpack_episode
from trimtab.trainer.ppo.prompts import Sampler
from trimtab.trainer.ppo.rollouts import RolloutClients
from trimtab.trainer.run import Run
from trimtab.trainer.stages import PpoConfig
from trimtab_client import ModelVersion


class Pipeline:
    """Batches in flight. Its methods belong to the training thread; calls to services run on a thread of their own."""

    def __init__(
        self,
        config: PpoConfig,
        clients: RolloutClients,
        prompts: Sampler[np.ndarray],
        journal: Journal,
        run: Run,
        loop: LoopThread,
        done_steps: int,
    ) -> None:
        self._config = config
        self._clients = clients
        self._prompts = prompts
        self._journal = journal
        self._run = run
        self._loop = loop
        self._next = done_steps + 1  # the first step that is not asked for yet
        self._flying: dict[int, tuple[Batch, Future[None] | None]] = {}
        self._loading: Future[None] | None = None

    def admit(self, version: ModelVersion) -> None:
        """Version is published: have the generator serve it and send the prompts that may now be sampled.

        Strictly on-policy it returns once the version is served, else at once.
        """
        last = min(version.step + 1 + self._config.max_staleness, self._config.steps)
        batches = [self._draw(step) for step in range(self._next, last + 1)]
        self._next += len(batches)
        lacking = [batch for batch in batches if not batch.whole]
        if lacking or self._asked_for_more(version):
            before, self._loading = self._loading, self._loop.submit(self._clients.load_version(version))
            if before is not None and before.done():
                before.result()
            if not self._config.max_staleness:
                self._run.wait(self._loading)
        for batch in batches:
            task = None if batch.whole else self._loop.submit(self._collect(batch, self._loading))
            self._flying[batch.step] = (batch, task)

    def take(self, step: int) -> Batch:
        """The batch of a step, whole and durable in the journal; waits for it.

        Raises StopRun, RunFailedError and what the services answered.
        """
        batch, task = self._flying.pop(step)
        if task is not None:
            self._run.wait(task)
            self._journal.sync()
        return batch

    def settle(self) -> None:
        """Wait until the newest version is served."""
        if self._loading is not None:
            self._run.wait(self._loading)

    def _asked_for_more(self, version: ModelVersion) -> bool:
        """Whether the newest version matters: some batch in flight, or the run's end."""
        return version.step == self._config.steps or any(task is not None for _, task in self._flying.values())

    def _draw(self, step: int) -> Batch:
        config = self._config
        prompts = self._prompts.draw(config.batch_size // config.samples_per_prompt)
        known = {index: unpack_episode(data) for index, data in self._journal.read(step).items()}
        return Batch(step, prompts, config.samples_per_prompt, self._prompts.state_dict(), known)

    async def _collect(self, batch: Batch, loading: Future[None] | None) -> None:
        if loading is not None:
            await asyncio.wrap_future(loading)
        await self._clients.collect(
            batch, lambda index, episode: self._journal.append(batch.step, index, pack_episode(episode))
        )


def whole_steps(journal: Journal, done_steps: int, batch_size: int) -> int:
    """The last step that a resume can train without asking a service: all its episodes, and those before, are there."""
    step = done_steps
    while journal.count(step + 1) == batch_size:
        step += 1
    return step

"""GeneratorService: completions, each as it finishes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from trimtab_client.conversations import Prompt
from trimtab_client.generation import Generation
from trimtab_client.messages import Completion, Sampling
from trimtab_client.models import AsyncModelClient, ModelClient
from trimtab_client.versions import VersionPin

DEFAULT_SAMPLING = Sampling()


class GeneratorClient(ModelClient):
    """Samples completions; several addresses share the prompts of a call."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = DEFAULT_SAMPLING,
        seeds: Sequence[Sequence[int]] | None = None,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Completion]:
        """Yield each completion as it finishes, in no fixed order. Closing the iterator ends the call.

        A server that goes away is asked again (or another is) for the completions that are still missing, with
        their seeds.

        Args:
            prompts: text, token ids or chat messages.
            seeds: one list of `sampling.n` seeds a prompt; without them seeds follow from `sampling.seed`, or are
                drawn.
        """
        generation = Generation(prompts, sampling, seeds, version)
        replicas = self._transport.routing.replicas
        return self._transport.streams(generation.shares(self._limits, replicas), timeout_s)


class AsyncGeneratorClient(AsyncModelClient):
    """Samples completions; several addresses share the prompts of a call."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = DEFAULT_SAMPLING,
        seeds: Sequence[Sequence[int]] | None = None,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Completion]:
        """Yield each completion as it finishes, in no fixed order. Closing the iterator ends the call.

        A server that goes away is asked again (or another is) for the completions that are still missing, with
        their seeds.

        Args:
            prompts: text, token ids or chat messages.
            seeds: one list of `sampling.n` seeds a prompt; without them seeds follow from `sampling.seed`, or are
                drawn.
        """
        generation = Generation(prompts, sampling, seeds, version)
        replicas = self._transport.routing.replicas
        return self._transport.streams(generation.shares(self._limits, replicas), timeout_s)

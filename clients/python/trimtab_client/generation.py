"""What one Generate call of the SDK asks of the servers: its shares, and what of each is still missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trimtab_client.calls import Call, Program
from trimtab_client.conversations import Prompt, most_tokens, prompt_to_proto
from trimtab_client.errors import contradiction
from trimtab_client.messages import Completion, Sampling
from trimtab_client.models import ServedLimits
from trimtab_client.seeds import sample_seeds
from trimtab_client.splitting import consecutive
from trimtab_client.v1 import generator_pb2, generator_pb2_grpc
from trimtab_client.versions import VersionPin, pin_to_proto


class Generation:
    """A call's prompts with a seed for each sample. ValueError where the seeds do not fit the prompts."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None,
        version: VersionPin | None,
    ) -> None:
        self.samples: int = max(1, sampling.n)
        self.seeds: list[list[int]] = sample_seeds(len(prompts), self.samples, sampling.seed, seeds)
        self.prompts: list[Prompt] = list(prompts)
        self.sampling: Sampling = dataclasses.replace(sampling, seed=None)
        self.version = version

    def shares(self, limits: ServedLimits, replicas: int) -> Program[Sequence[Share]]:
        """The call in shares within a server's limits, at least one a replica where there are prompts enough."""
        info = yield from limits.get()
        most_samples = min(self.samples, info.max_sequences or self.samples)
        # A prompt of more samples than one request may hold is asked for several times.
        pieces = [
            (prompt, range(first, min(first + most_samples, self.samples)))
            for prompt in range(len(self.prompts))
            for first in range(0, self.samples, most_samples)
        ]
        most_pieces = max(1, -(-len(pieces) // replicas))
        if info.max_sequences:
            most_pieces = min(most_pieces, info.max_sequences // most_samples)
        runs = consecutive([self.size(prompt) for prompt, _ in pieces], most_pieces, info.max_tokens)
        return [Share(self, pieces[run], info.max_tokens) for run in runs]

    def size(self, prompt: int) -> int:
        """No fewer than the tokens of a prompt."""
        return most_tokens(self.prompts[prompt])


class Share:
    """A `Stream` of some samples of some prompts; after a break it asks for those that are still missing."""

    def __init__(self, generation: Generation, pieces: Sequence[tuple[int, range]], max_tokens: int) -> None:
        self._generation = generation
        self._max_tokens = max_tokens
        self._empty = not pieces
        self._missing = {(prompt, sample): None for prompt, samples in pieces for sample in samples}
        self._asked: list[list[tuple[int, int]]] = []

    def next_call(self) -> Call[Completion] | None:
        """A request for what is missing; None when nothing is (a call without prompts is the server's to refuse)."""
        if not self._missing and not self._empty:
            return None
        self._asked = self._grouped()
        generation = self._generation
        sampling = dataclasses.replace(generation.sampling, n=len(self._asked[0]) if self._asked else 1)
        request = generator_pb2.GenerateRequest(
            prompts=[
                prompt_to_proto(generation.prompts[group[0][0]], [generation.seeds[p][s] for p, s in group])
                for group in self._asked
            ],
            sampling=sampling.to_proto(),
            version=pin_to_proto(generation.version),
        )
        stub = generator_pb2_grpc.GeneratorServiceStub
        places = [group[0][0] for group in self._asked]
        return Call(stub, "Generate", request, lambda one: Completion.from_proto(one.completion), places=places)

    def accept(self, item: Completion) -> Completion:
        """The completion under the caller's own indices; Internal for one that was not asked for."""
        try:
            prompt, sample = self._asked[item.prompt_index][item.sample_index]
            del self._missing[prompt, sample]
        except (IndexError, KeyError):
            raise contradiction(
                f"completion {item.sample_index} of prompt {item.prompt_index} was not asked for, or came twice"
            ) from None
        return dataclasses.replace(item, prompt_index=prompt, sample_index=sample)

    def may_resume(self) -> bool:
        """Always: each sample has its seed."""
        return True

    def ended(self) -> None:
        """Internal where the server ended the stream with completions missing."""
        self._empty = False
        missing = [key for group in self._asked for key in group if key in self._missing]
        if missing:
            raise contradiction(f"the stream ended with {len(missing)} completions missing")

    def _grouped(self) -> list[list[tuple[int, int]]]:
        """Missing samples, equally many a prompt of the request: all of a prompt's together, or else each alone.

        Each alone repeats its prompt, so it may be only as many as a request's tokens allow; the rest follows.
        """
        groups: dict[int, list[tuple[int, int]]] = {}
        for prompt, sample in self._missing:
            groups.setdefault(prompt, []).append((prompt, sample))
        if len({len(group) for group in groups.values()}) <= 1:
            return list(groups.values())
        alone = [[key] for key in self._missing]
        return alone[consecutive([self._generation.size(p) for p, _ in self._missing], 0, self._max_tokens)[0]]

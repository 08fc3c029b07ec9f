"""Answers of one version to a list of prompts: sampled over the wire, kept with all that scoring them needs.

`compare` and the rounds' evaluation measure them; nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.rounds.evaluate import KlSummary, TextSummary, kl_summary, text_summary
from trimtab.rounds.scorers import Scorer, WirePrompt
from trimtab.trainer.data import load_prompts
from trimtab_client import Completion, GeneratorClient, ModelVersion, RaggedTokens, ReferenceClient, Sampling

SAMPLE_TIMEOUT_S = 900.0


@dataclass(frozen=True, eq=False)
class Answers:
    """S answers to each of P prompts, prompt after prompt.

    Attributes:
        version: None for a model that is no version of the store.
        tokenizer_digest: of the model that sampled them.
    """

    version: ModelVersion | None
    tokenizer_digest: str
    prompts: tuple[WirePrompt, ...]
    completions: tuple[Completion, ...]
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        """(P, S)."""
        return len(self.prompts), len(self.completions) // len(self.prompts)

    @property
    def texts(self) -> list[str]:
        """All responses, prompt after prompt."""
        return [completion.text for completion in self.completions]

    @property
    def tokens(self) -> RaggedTokens:
        """Prompts with their responses, as reward and reference take them."""
        return RaggedTokens.from_sequences(
            [np.concatenate([c.prompt_token_ids, c.token_ids]) for c in self.completions],
            prompt_lengths=[len(c.prompt_token_ids) for c in self.completions],
        )

    def scores(self, scorer: Scorer) -> np.ndarray:
        """What a scorer gives each answer, float64 [P, S]."""
        asked = [self.prompts[completion.prompt_index] for completion in self.completions]
        return scorer.score(asked, self.texts).reshape(self.shape)

    def against_reference(self, reference: ReferenceClient) -> tuple[KlSummary, TextSummary]:
        """KL from the reference, and what the texts are like, by one call to the reference."""
        rows = reference.logprobs(self.tokens, self.tokenizer_digest, temperature=self.temperature).logprobs.split()
        prompts = [completion.prompt_index for completion in self.completions]
        ended = [completion.finish_reason == "stop" for completion in self.completions]
        kl = kl_summary([completion.logprobs for completion in self.completions], rows, prompts)
        return kl, text_summary(self.texts, rows, ended, prompts)


def draw(
    generator: GeneratorClient, version: ModelVersion | None, prompts: Sequence[WirePrompt], sampling: Sampling
) -> Answers:
    """Sample `sampling.n` answers to each prompt; the generator is made to serve `version` first.

    With None it answers with what it serves.
    """
    info = generator.load_version(version) if version else generator.get_model()
    stream = generator.generate(list(prompts), sampling, version=version, timeout_s=SAMPLE_TIMEOUT_S)
    completions = sorted(stream, key=lambda completion: (completion.prompt_index, completion.sample_index))
    return Answers(version, info.tokenizer_digest, tuple(prompts), tuple(completions), sampling.temperature)


def read_prompts(source: str | Path) -> list[WirePrompt]:
    """The prompts of a file as the client sends them. Raises DataError."""
    rows = [row.prompt for row in load_prompts(source)]
    return [prompt if isinstance(prompt, str) else [message.as_dict() for message in prompt] for prompt in rows]

"""Deterministic mode: not one bit of a seeded sample depends on what else is decoded, where, or when."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from trimtab.generator.engine import FinishedSequence, SequenceRequest
from trimtab.generator.local.blocks import BLOCK
from trimtab.generator.local.scheduler import LocalEngine


def serve_at_random_times(
    engine: LocalEngine, watched: list[SequenceRequest], mates: list[SequenceRequest], draws: np.random.Generator
) -> dict[int, FinishedSequence]:
    """All sequences in a random order, a few at a time between steps, some mates cancelled again; the watched ones."""
    coming = [*watched, *mates]
    draws.shuffle(coming)  # type: ignore[arg-type]
    kept = {request.sequence_id for request in watched}
    finished = {}
    while coming or engine.has_work:
        arriving, coming = coming[: (count := int(draws.integers(0, 5)))], coming[count:]
        engine.submit(arriving)
        engine.cancel([r.sequence_id for r in arriving if r.sequence_id not in kept and draws.random() < 0.2])
        for _ in range(int(draws.integers(1, 8))):
            for outcome in engine.step():
                assert isinstance(outcome, FinishedSequence)
                finished[outcome.sequence_id] = outcome
    return {sequence_id: finished[sequence_id] for sequence_id in kept}


def bits(finished: dict[int, FinishedSequence]) -> dict[int, tuple[bytes, bytes]]:
    return {key: (got.token_ids.tobytes(), got.logprobs.tobytes()) for key, got in sorted(finished.items())}


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.float32),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen3", torch.float32, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_seeded_sample_has_the_same_bits_in_any_company(
    lab: ModuleType, architecture: str, dtype: torch.dtype
) -> None:
    model = lab.build(architecture, scale=2.0).to(dtype)
    draws = np.random.default_rng(5)
    # Some grow from one width of attention into the next, in one prompt several samples, some narrowed.
    watched = [
        lab.request(i, prompt, seed=i, max_tokens=int(draws.integers(5, 50)), temperature=0.5 + 0.25 * (i % 4))
        for i, prompt in enumerate(lab.random_prompts(8, longest=60, seed=1))
    ]
    watched += [
        replace(lab.request(8 + i, watched[0].prompt_ids, seed=50 + i, top_p=0.9, top_k=40), prompt_key=900)
        for i in range(3)
    ]
    options = {"max_slots": BLOCK + 4, "prefill_tokens": 150, "deterministic": True}
    alone = {}
    for request in watched:
        alone |= lab.run(lab.engine_of(model, **options), [request])
    engine = lab.engine_of(model, **options)
    for round_ in range(2):
        mates = [
            lab.request(100 * (round_ + 1) + i, prompt, seed=900 + i, max_tokens=int(draws.integers(1, 40)))
            for i, prompt in enumerate(lab.random_prompts(16, longest=70, seed=round_ + 7))
        ]
        assert bits(serve_at_random_times(engine, watched, mates, draws)) == bits(alone)


def test_its_logprobs_equal_full_forwards(lab: ModuleType) -> None:
    model = lab.build("llama")
    requests = [lab.request(i, prompt, seed=i) for i, prompt in enumerate(lab.random_prompts(7))]
    finished = lab.run(lab.engine_of(model, deterministic=True), requests)
    for asked in requests:
        got = finished[asked.sequence_id]
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_the_llama_family_is_decoded_in_company_and_others_one_at_a_time(lab: ModuleType) -> None:
    slots = {
        name: lab.engine_of(lab.build(name), max_slots=9, deterministic=True).free_slots
        for name in ("llama", "qwen3", "gpt2", "gemma2")
    }
    assert slots == {"llama": 9, "qwen3": 9, "gpt2": 1, "gemma2": 1}

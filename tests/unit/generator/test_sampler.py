"""Draws: the generator's known answers, the distributions that temperature, top-k and top-p mean, and determinism."""

import numpy as np
import pytest
import torch

from trimtab.generator.local.philox import derive_seed, philox4x32, uniforms
from trimtab.generator.local.sampler import SampleRows, sample
from trimtab.generator.local.slots import SlotTable

FULL = 0xFFFFFFFF
DRAWS = 20_000


def rows(count: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 1) -> SampleRows:
    return SampleRows(
        draws=uniforms(np.full(count, seed, np.uint64), np.arange(count)),
        temperatures=np.full(count, temperature, np.float32),
        top_ps=np.full(count, top_p, np.float32),
        top_ks=np.full(count, top_k, np.int64),
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(
        tuple(np.array([word], np.uint64) for word in counter), tuple(np.array([word], np.uint64) for word in key)
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    seeds = np.array([3, 2**64 - 1, 3, 5], np.uint64)
    positions = np.array([0, 7, 1, 0])
    batch = uniforms(seeds, positions)
    alone = [float(uniforms(seeds[i : i + 1], positions[i : i + 1])[0]) for i in range(4)]
    assert batch.tolist() == alone
    assert len(set(alone)) == 4
    many = uniforms(np.arange(DRAWS).astype(np.uint64), np.zeros(DRAWS))
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


def test_rows_draw_by_their_seed_and_position_wherever_they_move() -> None:
    table = SlotTable(3, 5, [0])
    table.slots = [None] * 3  # type: ignore[list-item]
    table.seeds[:], table.counts[:] = (7, 8, 9), (0, 0, 0)
    for step in range(150):
        rows = slice(0, table.count)
        expected = uniforms(table.seeds[rows], table.counts[rows])
        assert table.sample_rows(rows).draws.tolist() == expected.tolist(), step
        table.counts[rows] += 1
        if step == 70:
            table.keep([2, 1])
    assert table.seeds[:2].tolist() == [9, 8]


def test_derived_seeds_differ_for_every_sample() -> None:
    seeds = {derive_seed(seed, prompt, k) for seed in (0, 2**63) for prompt in range(20) for k in range(20)}
    assert len(seeds) == 800


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, -3.0])
    got = sample(logits.expand(DRAWS, -1).clone(), rows(DRAWS, temperature=temperature))
    probs = torch.softmax(logits / temperature, dim=-1).numpy()
    counts = np.bincount(got.token_ids, minlength=5) / DRAWS
    np.testing.assert_allclose(counts, probs, atol=0.012)
    np.testing.assert_allclose(got.logprobs, np.log(probs)[got.token_ids], atol=1e-5)


def test_top_k_and_top_p_cut_the_choice_but_not_the_reported_logprob() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]))[torch.tensor([3, 0, 4, 1, 2])]
    full = torch.log_softmax(logits, dim=-1).numpy()
    for options, allowed in (
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),
    ):
        got = sample(logits.expand(2000, -1).clone(), rows(2000, **options))
        assert set(got.token_ids.tolist()) == allowed, options
        np.testing.assert_allclose(got.logprobs, full[got.token_ids], atol=1e-5)


def test_rows_of_different_settings_do_not_touch_each_other() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 2
    mixed = SampleRows(
        draws=uniforms(np.arange(4).astype(np.uint64), np.arange(4)),
        temperatures=np.array([0.0, 1.0, 0.3, 1.0], np.float32),
        top_ps=np.array([1.0, 0.5, 1.0, 1.0], np.float32),
        top_ks=np.array([0, 0, 5, 0]),
    )
    together = sample(logits, mixed)
    for i in range(4):
        one = SampleRows(*(getattr(mixed, name)[i : i + 1] for name in mixed.__dataclass_fields__))
        alone = sample(logits[i : i + 1], one)
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-6)
    assert together.token_ids[0] == int(logits[0].argmax())


def test_banned_tokens_are_never_chosen_and_still_count_in_the_logprob() -> None:
    logits = torch.tensor([5.0, 1.0, 0.0])
    banned = torch.tensor([True, False, False]).expand(500, -1)
    for temperature in (0.0, 1.0):
        got = sample(logits.expand(500, -1).clone(), rows(500, temperature=temperature), banned)
        assert 0 not in got.token_ids
        full = torch.log_softmax(logits, dim=-1).numpy()
        np.testing.assert_allclose(got.logprobs, full[got.token_ids], atol=1e-5)


def test_impossible_tokens_are_never_drawn_and_nan_is_reported() -> None:
    logits = torch.full((DRAWS, 4), -torch.inf)
    logits[:, 2] = 0.0
    assert set(sample(logits, rows(DRAWS)).token_ids.tolist()) == {2}
    broken = sample(torch.full((1, 4), torch.nan), rows(1))
    assert np.isnan(broken.logprobs[0]) and 0 <= broken.token_ids[0] < 4


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.7, 3.0])
def test_logprobs_are_those_of_a_float64_log_softmax_however_far_the_logits_are_apart(temperature: float) -> None:
    logits = torch.randn(64, 97, generator=torch.Generator().manual_seed(2)) * 8
    logits[:, 5] += 200
    banned = torch.zeros(64, 97, dtype=torch.bool)
    banned[::2, 5] = True
    got = sample(logits, rows(64, temperature=temperature, top_k=40), banned)
    assert (got.token_ids[::2] != 5).all() and (got.token_ids[1::2] == 5).all()
    exact = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1).numpy()
    np.testing.assert_allclose(got.logprobs, exact[np.arange(64), got.token_ids], rtol=1e-6, atol=1e-6)

"""The local engine against its oracle, full forwards without a cache, and what it promises about slots and ends."""

import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.generator.local import selfcheck
from trimtab.generator.local.scheduler import LocalEngine

ARCHITECTURES = ["llama", "gpt2", "qwen3", "gemma2", "opt", "bloom"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logprobs_equal_full_forwards(lab: ModuleType, architecture: str) -> None:
    model = lab.build(architecture)
    selfcheck.prepare(model)
    # More sequences than slots, of different lengths: slots are refilled in the middle of others' decoding.
    temperatures = [1.0, 0.7, 0.0, 1.5]
    requests = [
        lab.request(i, prompt, seed=i, temperature=temperatures[i % 4], max_tokens=3 + 5 * (i % 4))
        for i, prompt in enumerate(lab.random_prompts(11))
    ]
    finished = lab.run(lab.engine_of(model), requests)
    for asked in requests:
        got = finished[asked.sequence_id]
        assert len(got.token_ids) == asked.sampling.max_tokens
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, asked.sampling.temperature)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_takes_the_most_likely_token_of_a_full_forward(lab: ModuleType, architecture: str) -> None:
    model = lab.build(architecture)
    requests = [lab.request(i, prompt, temperature=0.0) for i, prompt in enumerate(lab.random_prompts(6))]
    finished = lab.run(lab.engine_of(model), requests)
    for asked in requests:
        got = finished[asked.sequence_id].token_ids
        ids = torch.from_numpy(np.concatenate([asked.prompt_ids, got]).astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(asked.prompt_ids) - 1 : -1]
        np.testing.assert_array_equal(got, logits.argmax(dim=-1).numpy())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_do_not_depend_on_batch_mates_or_slots(lab: ModuleType, architecture: str) -> None:
    model = lab.build(architecture)
    requests = [lab.request(i, p, seed=100 + i, max_tokens=20) for i, p in enumerate(lab.random_prompts(9))]
    together = lab.run(lab.engine_of(model, max_slots=5), requests)
    for asked in requests:
        alone = lab.run(lab.engine_of(model, max_slots=1), [asked])
        np.testing.assert_array_equal(alone[asked.sequence_id].token_ids, together[asked.sequence_id].token_ids)


def test_seeds_decide_the_samples_of_one_shared_prefill(lab: ModuleType) -> None:
    prompt = lab.random_prompts(1)[0]
    requests = [replace(lab.request(i, prompt, seed=i // 2), prompt_key=7) for i in range(8)]
    engine = lab.engine_of(lab.build("llama"), max_slots=6)
    got = lab.run(engine, requests)
    for i in range(0, 8, 2):
        np.testing.assert_array_equal(got[i].token_ids, got[i + 1].token_ids)
    assert len({tuple(got[i].token_ids) for i in range(0, 8, 2)}) == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_many_refills_keep_the_cache_right(lab: ModuleType, architecture: str) -> None:
    """Long and short sequences over few slots: the window moves, is compacted, shifted and grown."""
    model = lab.build(architecture)
    draws = np.random.default_rng(3)
    prompts = lab.random_prompts(30, longest=60)
    requests = [
        lab.request(i, prompt, seed=i, max_tokens=int(draws.integers(1, 64))) for i, prompt in enumerate(prompts)
    ]
    finished = lab.run(lab.engine_of(model, max_slots=7, prefill_tokens=100), requests)
    for asked in requests:
        got = finished[asked.sequence_id]
        np.testing.assert_allclose(
            got.logprobs, lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0), atol=1e-4
        )


def test_end_tokens_stop_unless_ignored(lab: ModuleType) -> None:
    model = lab.build("gpt2", scale=1.0)
    requests = [
        lab.request(i, p, seed=i, max_tokens=100, ignore_eos=False) for i, p in enumerate(lab.random_prompts(20))
    ]
    finished = lab.run(lab.engine_of(model, eos_token_ids=tuple(range(40)), max_slots=20), requests)
    for got in finished.values():
        ends = np.flatnonzero(got.token_ids < 40)
        assert got.finish_reason == "stop"
        assert ends.tolist() == [len(got.token_ids) - 1]
    ignoring = [lab.request(i, p, seed=i, max_tokens=30) for i, p in enumerate(lab.random_prompts(5))]
    for got in lab.run(lab.engine_of(model, eos_token_ids=tuple(range(40))), ignoring).values():
        assert (got.finish_reason, len(got.token_ids)) == ("length", 30)


def test_min_tokens_bans_end_tokens_and_leaves_the_reported_logprob_alone(lab: ModuleType) -> None:
    model = lab.build("gpt2", scale=1.0)
    prompts = lab.random_prompts(12)
    requests = [
        lab.request(i, p, seed=i, max_tokens=60, ignore_eos=False, min_tokens=9, stop_token_ids=(200, 201))
        for i, p in enumerate(prompts)
    ]
    finished = lab.run(lab.engine_of(model, eos_token_ids=tuple(range(150))), requests)
    for asked in requests:
        got = finished[asked.sequence_id]
        early = got.token_ids[:9]
        assert len(got.token_ids) >= 9 and not ((early < 150) | (early == 200) | (early == 201))[:-1].any()
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_own_stop_tokens_end_one_sequence_only(lab: ModuleType) -> None:
    model = lab.build("gpt2", scale=1.0)
    prompt = lab.random_prompts(1)[0]
    plain = lab.request(0, prompt, seed=5, max_tokens=30)
    token = int(lab.run(lab.engine_of(model), [plain])[0].token_ids[10])
    stopping = lab.request(1, prompt, seed=5, max_tokens=30, stop_token_ids=(token,))
    finished = lab.run(lab.engine_of(model), [plain, stopping])
    assert len(finished[0].token_ids) == 30
    assert finished[1].finish_reason == "stop"
    assert int(finished[1].token_ids[-1]) == token and len(finished[1].token_ids) <= 11


def test_a_stop_string_ends_the_response_and_is_not_in_its_text(lab: ModuleType) -> None:
    model = lab.build("gpt2", scale=1.0)
    prompt = lab.random_prompts(1)[0]
    plain = lab.request(0, prompt, seed=11, max_tokens=60)
    text = lab.run(lab.engine_of(model), [plain])[0].text
    stop = next(text[i : i + 2] for i in range(20, 50) if "�" not in text[i : i + 2])
    stopped = lab.run(lab.engine_of(model), [lab.request(1, prompt, seed=11, max_tokens=60, stop=("never!", stop))])[1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert len(stopped.token_ids) == len(stopped.logprobs) < 60


def test_the_models_longest_sequence_ends_a_response(lab: ModuleType) -> None:
    request = lab.request(0, range(25), max_tokens=1000)
    got = lab.run(lab.engine_of(lab.build("llama"), max_length=40), [request])[0]
    assert (got.finish_reason, len(got.token_ids)) == ("length", 15)


def test_cancelled_sequences_free_their_slots(lab: ModuleType) -> None:
    engine = lab.engine_of(lab.build("llama"), max_slots=2)
    engine.submit([lab.request(i, range(5), max_tokens=100) for i in range(3)])
    engine.step()
    assert (engine.live, engine.waiting, engine.free_slots) == (2, 1, 0)
    engine.cancel([0, 2])
    engine.submit([lab.request(9, range(4), max_tokens=2)])
    outcomes = engine.step() + engine.step()
    assert [outcome.sequence_id for outcome in outcomes] == [9]
    assert (engine.live, engine.waiting) == (1, 0)
    engine.cancel([1])
    assert engine.step() == [] and not engine.has_work


def test_a_sequence_past_its_deadline_is_never_started(lab: ModuleType) -> None:
    engine = lab.engine_of(lab.build("llama"))
    late = replace(lab.request(0, range(5)), deadline_s=time.monotonic() - 1)
    engine.submit([late, lab.request(1, range(5), max_tokens=1)])
    outcomes = {outcome.sequence_id: outcome for outcome in engine.step()}
    assert outcomes[0].reason == "expired"
    assert len(outcomes[1].token_ids) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_numbers_that_are_not_finite_fail_their_sequence_and_spoil_no_other(lab: ModuleType, architecture: str) -> None:
    model = lab.build(architecture)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer the embedding's own
    model.get_input_embeddings().weight.data[258] = torch.nan
    engine = lab.engine_of(model, max_slots=2)
    # A longer mate keeps the broken row's columns in the window when the next sequence takes the row.
    never_258 = {"stop_token_ids": (258,), "min_tokens": 40}
    mate = lab.request(0, range(40), max_tokens=40, **never_258)
    broken = lab.request(1, [1, 2, 258, *range(20)])
    engine.submit([mate, broken])
    (failed,) = engine.step()
    assert (failed.sequence_id, failed.reason, engine.live) == (1, "broken", 1)
    assert "not finite" in failed.message
    following = lab.request(2, range(3), max_tokens=40, **never_258)
    finished = lab.run(engine, [following])
    for asked in (mate, following):
        got = finished[asked.sequence_id]
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_bfloat16_models_decode(lab: ModuleType) -> None:
    model = lab.build("llama", scale=1.0).to(torch.bfloat16)
    requests = [lab.request(i, p, seed=i) for i, p in enumerate(lab.random_prompts(6))]
    for asked in requests:
        got = lab.run(lab.engine_of(model), [asked])[asked.sequence_id]
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=0.05)


def test_the_real_example_model_tells_stories_with_exact_logprobs(lab: ModuleType) -> None:
    folder = Path(__file__).parents[3] / "examples" / "models" / "stories260K-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    selfcheck.prepare(model)
    engine = LocalEngine(
        model, tokenizer, eos_token_ids=(tokenizer.eos_token_id,), version=lab.V1, max_length=256, max_slots=4
    )
    prompts = ["Once upon a time", "One day, Lily", "The big dog was", "Tim and Sue went to the park.", "A cat"]
    requests = [
        lab.request(i, tokenizer.encode(prompt), seed=i, max_tokens=60, temperature=float(i % 3), ignore_eos=False)
        for i, prompt in enumerate(prompts)
    ]
    finished = lab.run(engine, requests)
    for asked in requests:
        got = finished[asked.sequence_id]
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, asked.sampling.temperature)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
    assert "".join((prompts[0], finished[0].text)).startswith("Once upon a time, there was a little girl named")

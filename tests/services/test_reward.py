"""The reward server as its callers meet it: a real gRPC server, a real store, small random models."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.services.reward_room import field_of, refusal, serving
from trimtab.reward.config import RewardConfig
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import StartError
from trimtab.weights.store import open_store
from trimtab_client.ragged import RaggedTokens, decode_floats
from trimtab_client.v1 import model_pb2, reward_pb2, tokens_pb2

SEQUENCES = [[0, 7, 9, 12], [0, 5], [0, *range(5, 45)], [0, 30, 31, 32, 33, 34, 1]]


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    return make_tiny("reward", seed=1)


@pytest.fixture(scope="module")
def own_forward(folder) -> Callable[[list[int]], float]:
    """transformers' own score of one unpadded sequence."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(sequence: list[int]) -> float:
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([sequence])).last_hidden_state
            return float(model.score(hidden)[0, -1, 0])

    return score


async def test_scores_equal_transformers_own_forward(folder, own_forward):
    async with serving(folder) as peer:
        reply = await peer.send(tokens=await peer.batch(SEQUENCES))
    scores = decode_floats(reply.scores)
    assert scores == pytest.approx([own_forward(sequence) for sequence in SEQUENCES], abs=1e-5)
    assert np.ptp(scores) > 0.01, "the model tells these sequences apart"
    assert reply.version.name == str(folder)
    np.testing.assert_array_equal(decode_floats(reply.normalized_scores), scores)


async def test_scores_do_not_depend_on_batch_mates(folder):
    async with serving(folder) as peer:
        together = await peer.score(SEQUENCES)
        backwards = await peer.score(SEQUENCES[::-1])
        alone = np.concatenate(await asyncio.gather(*(peer.score([sequence]) for sequence in SEQUENCES)))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards[::-1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_deterministic_scores_are_bitwise_the_same_in_any_company(folder, dtype):
    async with serving(folder, deterministic=True, dtype=dtype) as peer:
        together = await peer.score(SEQUENCES)
        alone = np.concatenate([await peer.score([sequence]) for sequence in SEQUENCES])
    assert together.tobytes() == alone.tobytes()


async def test_texts_score_as_their_tokens(folder):
    async with serving(folder) as peer:
        pairs = [reward_pb2.TextPair(prompt="w1 w2", response=" w3 w4"), reward_pb2.TextPair(prompt="w9", response="")]
        reply = await peer.send(texts=reward_pb2.TextBatch(items=pairs))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        want = await peer.score([tokenizer.encode("w1 w2 w3 w4"), tokenizer.encode("w9")])
    np.testing.assert_allclose(decode_floats(reply.scores), want, atol=1e-6)


async def test_conversations_go_through_the_models_own_template(folder):
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    conversation = tokens_pb2.Conversation(messages=[tokens_pb2.ChatMessage(**message) for message in messages])
    async with serving(folder) as peer:
        reply = await peer.send(conversations=reward_pb2.ConversationBatch(conversations=[conversation]))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        want = await peer.score([tokenizer.encode(text, add_special_tokens=False)])
    np.testing.assert_allclose(decode_floats(reply.scores), want, atol=1e-6)


async def test_a_model_of_the_reward_stage_normalises_and_encodes_as_it_was_trained(make_tiny):
    trained = make_tiny("reward", seed=1, trimtab_score_mean=0.5, trimtab_score_std=2.0)
    async with serving(trained) as peer:
        pair = reward_pb2.TextPair(prompt="w1", response=" w2")
        reply = await peer.send(texts=reward_pb2.TextBatch(items=[pair]))
        conversation = tokens_pb2.Conversation(
            messages=[
                tokens_pb2.ChatMessage(role="user", content="w1"),
                tokens_pb2.ChatMessage(role="assistant", content="w2"),
            ]
        )
        chat = await peer.send(conversations=reward_pb2.ConversationBatch(conversations=[conversation]))
        tokenizer = AutoTokenizer.from_pretrained(trained)
        text_ids = [*tokenizer.encode("w1 w2"), 1]
        chat_ids = [*tokenizer.encode("user w1 <eos> assistant w2", add_special_tokens=False), 1]
        want = await peer.score([text_ids, chat_ids])
    scores = decode_floats(reply.scores)
    np.testing.assert_allclose(scores, want[:1], atol=1e-6)
    np.testing.assert_allclose(decode_floats(chat.scores), want[1:], atol=1e-6)
    np.testing.assert_allclose(decode_floats(reply.normalized_scores), (scores - 0.5) / 2, atol=1e-6)


async def test_a_bad_request_is_refused_by_field(make_tiny):
    folder = make_tiny("reward", chat=False)
    async with serving(folder, limits=RequestLimits(max_sequences=4, max_tokens=100)) as peer:
        digest = (await peer.info()).tokenizer_digest
        chat = tokens_pb2.Conversation(messages=[tokens_pb2.ChatMessage(role="user", content="w1")])

        def tokens(sequences, digest=digest) -> dict:
            ragged = RaggedTokens.from_sequences(sequences).to_proto()
            return {"tokens": reward_pb2.TokenBatch(tokens=ragged, tokenizer_digest=digest)}

        contradiction = reward_pb2.TokenBatch(
            tokens=tokens_pb2.RaggedTokens(token_ids=bytes(8), lengths=[3]), tokenizer_digest=digest
        )
        long_text = reward_pb2.TextPair(prompt="w1 " * 40, response="w2 " * 40)
        table: list[tuple[dict, StatusCode, str]] = [
            ({}, StatusCode.INVALID_ARGUMENT, "input"),
            (tokens([]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            (tokens([[1]] * 5), StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            (tokens([[1] * 60, [1] * 60]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            (tokens([[1], [999]]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.token_ids"),
            (tokens([[1], [-3]]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.token_ids"),
            (tokens([[1] * 65]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            (tokens([[1], []]), StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            ({"tokens": contradiction}, StatusCode.INVALID_ARGUMENT, "tokens.tokens.lengths"),
            (tokens([[1]], digest=""), StatusCode.INVALID_ARGUMENT, "tokens.tokenizer_digest"),
            (tokens([[1]], digest="blake3:other"), StatusCode.FAILED_PRECONDITION, "tokens.tokenizer_digest"),
            ({"texts": reward_pb2.TextBatch()}, StatusCode.INVALID_ARGUMENT, "texts.items"),
            ({"texts": reward_pb2.TextBatch(items=[long_text])}, StatusCode.INVALID_ARGUMENT, "texts.items"),
            (
                {"conversations": reward_pb2.ConversationBatch(conversations=[chat])},
                StatusCode.INVALID_ARGUMENT,
                "conversations.conversations[0]",
            ),
        ]
        for fields, code, field in table:
            error = await refusal(peer.send(**fields))
            assert (error.code(), field_of(error)) == (code, field), error.details()
        assert len(await peer.score([[1]])) == 1


async def test_too_long_sequences_are_cut_at_their_end_only_on_request(folder):
    async with serving(folder, max_length=10) as peer:
        batch = await peer.batch([SEQUENCES[0], SEQUENCES[2]])
        assert (await refusal(peer.send(tokens=batch))).code() == StatusCode.INVALID_ARGUMENT
        reply = await peer.send(tokens=batch, truncate=True)
        want = await peer.score([SEQUENCES[0], SEQUENCES[2][:10]])
    assert list(reply.truncated) == [1]
    np.testing.assert_allclose(decode_floats(reply.scores), want, atol=1e-6)


async def test_a_score_that_is_no_number_is_an_error_that_names_the_sequence(make_tiny):
    def poison(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight.data[20] = float("nan")

    async with serving(make_tiny("reward", edit=poison)) as peer:
        bad = asyncio.create_task(peer.score([[0, 5], [0, 20], [0, 6]]))
        good = asyncio.create_task(peer.score([[0, 5], [0, 6]]))
        error = await refusal(bad)
        assert np.isfinite(await good).all()
    assert error.code() == StatusCode.INTERNAL
    assert "sequence 1 " in (error.details() or "")


async def test_cancelled_and_late_work_is_not_computed_and_a_full_queue_refuses(folder):
    async with serving(folder, queue_limit=2) as peer:
        worker, metrics = peer.server.context.worker, peer.server.context.metrics
        release = asyncio.Event()
        loop = asyncio.get_running_loop()
        blocked = asyncio.create_task(
            worker.run(lambda: asyncio.run_coroutine_threadsafe(release.wait(), loop).result(20))
        )
        await peer.info()
        first = asyncio.create_task(peer.score([[0, 5]]))
        await asyncio.sleep(0.2)
        dropped = asyncio.create_task(peer.score([[0, 6]]))
        late = asyncio.create_task(peer.send(tokens=await peer.batch([[0, 7]]), within_s=0.3))
        await asyncio.sleep(0.2)
        full = await refusal(peer.score([[0, 8]]))
        dropped.cancel()
        assert (await refusal(late)).code() == StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.2)
        release.set()
        await blocked
        await first
        assert metrics.registry.get_sample_value("trimtab_sequences_total") == 1
    assert full.code() == StatusCode.RESOURCE_EXHAUSTED
    status = status_pb2.Status.FromString(dict(full.trailing_metadata() or ())["grpc-status-details-bin"])
    assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)


async def test_load_version_swaps_and_each_reply_names_its_version(folder, make_tiny, tmp_path):
    store = open_store(str(tmp_path / "store"))
    first = store.publish(folder, run_id="rm", name="reward", step=1).version
    second = store.publish(make_tiny("reward", seed=2), run_id="rm", name="reward", step=2).version
    async with serving("version:rm/reward@1", store=str(tmp_path / "store")) as peer:
        before = await peer.send(tokens=await peer.batch(SEQUENCES))
        pin = model_pb2.VersionPin(at_least_step=2)
        pinned = asyncio.create_task(peer.send(tokens=await peer.batch(SEQUENCES), version=pin))
        await asyncio.sleep(0.1)
        assert (await peer.load(second.to_proto())).version.step == 2
        after = await pinned
        missing = await refusal(peer.load(model_pb2.ModelVersion(run_id="rm", name="reward", step=9)))
        unnamed = await refusal(peer.load(model_pb2.ModelVersion(step=9)))
        old = await refusal(
            peer.send(tokens=await peer.batch(SEQUENCES), version=model_pb2.VersionPin(exact=first.to_proto()))
        )
        await peer.load(first.to_proto())
        again = await peer.send(tokens=await peer.batch(SEQUENCES))
    assert (before.version.digest, after.version.digest) == (first.digest, second.digest)
    assert before.scores != after.scores
    assert again.scores == before.scores, "rolled back"
    assert missing.code() == StatusCode.NOT_FOUND
    assert (unnamed.code(), field_of(unnamed)) == (StatusCode.INVALID_ARGUMENT, "version.run_id")
    assert old.code() == StatusCode.FAILED_PRECONDITION


async def test_a_version_that_is_swapped_in_scores_as_one_that_was_loaded_at_start(folder, make_tiny, tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.publish(folder, run_id="rm", name="reward", step=1)
    second = store.publish(make_tiny("reward", seed=2), run_id="rm", name="reward", step=2).version
    settings = {"store": str(tmp_path / "store"), "dtype": "bfloat16"}
    async with serving("version:rm/reward@2", **settings) as peer:
        want = await peer.score(SEQUENCES)
    async with serving("version:rm/reward@1", **settings) as peer:
        assert (await peer.load(second.to_proto())).dtype == "bfloat16"
        got = await peer.score(SEQUENCES)
    assert got.tobytes() == want.tobytes()


async def test_a_followed_pointer_moves_the_server_and_a_corrupt_version_does_not(folder, make_tiny, tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.publish(folder, run_id="rm", name="reward", step=1)
    settings = {"store": str(tmp_path / "store"), "follow": "rm/reward", "poll_interval_s": 0.05}
    async with serving("version:rm/reward", **settings) as peer:
        broken = store.publish(make_tiny("reward", seed=2), run_id="rm", name="reward", step=2, set_current=False)
        weights = Path(store.fetch(broken)) / "model.safetensors"
        weights.chmod(0o644)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        store.set_current("rm", "reward", 2)
        loads = peer.server.context.metrics.version_loads.labels("failed")
        await until(lambda: loads.collect()[0].samples[0].value > 0)
        assert (await peer.info()).version.step == 1
        assert (await refusal(peer.load(broken.version.to_proto()))).code() == StatusCode.DATA_LOSS
        assert len(await peer.score(SEQUENCES)) == len(SEQUENCES)
        store.publish(make_tiny("reward", seed=3), run_id="rm", name="reward", step=3)
        pin = model_pb2.VersionPin(at_least_step=3)
        assert (await peer.send(tokens=await peer.batch(SEQUENCES), version=pin)).version.step == 3


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 a counter of Prometheus has no event
            await asyncio.sleep(0.02)


async def test_a_server_without_a_store_never_moves(folder):
    async with serving(folder) as peer:
        error = await refusal(peer.load(model_pb2.ModelVersion(run_id="rm", name="reward", step=1)))
    assert error.code() == StatusCode.FAILED_PRECONDITION


async def test_what_cannot_be_served_is_refused_at_start_with_the_reason(folder, make_tiny, tmp_path):
    corrupt = tmp_path / "corrupt"
    shutil.copytree(folder, corrupt)
    (corrupt / "model.safetensors").write_bytes(b"\xff" * 100)

    def all_nan(model: torch.nn.Module) -> None:
        model.score.weight.data[:] = float("nan")

    table = [
        (tmp_path / "absent", {}, "model: .*absent"),
        (corrupt, {}, "weights: .*corrupt"),
        (make_tiny("policy"), {}, "weights: .*score"),
        (make_tiny("reward", edit=all_nan), {}, "not finite"),
        (make_tiny("reward", trimtab_score_mean=0.0, trimtab_score_std=0.0), {}, "trimtab_score_std 0.0"),
        ("version:rm/reward@3", {"store": str(tmp_path / "store")}, "rm/reward"),
    ]
    for model, settings, reason in table:
        with pytest.raises(StartError, match=reason):
            async with serving(model, **settings):
                pytest.fail(f"{model} was served")


@pytest.mark.parametrize("settings", [{"follow": "rm/reward"}, {"model": "version:rm/reward"}])
def test_versions_need_a_store(settings):
    with pytest.raises(ValueError, match="needs a store"):
        RewardConfig(**{"model": "folder", **settings})


def test_a_process_serves_until_sigterm_and_exits_0(folder, tmp_path):
    ready = tmp_path / "ready.json"
    settings = f"model={str(folder)!r}, port=0, metrics_port=None, threads=1, ready_file={str(ready)!r}"
    imports = "import sys; from trimtab.reward.config import RewardConfig; from trimtab.reward.service import main"
    process = subprocess.Popen([sys.executable, "-c", f"{imports}; sys.exit(main(RewardConfig({settings})))"])
    try:
        for _ in range(600):
            if ready.exists() or process.poll() is not None:
                break
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert json.loads(ready.read_text())["port"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()

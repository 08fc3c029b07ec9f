"""The reference server as its callers meet it: a real gRPC server and small random models."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from trimtab.kernels import backends, chunked_torch
from trimtab.reference.config import ReferenceConfig
from trimtab.reference.service import LABEL, SERVICES, load
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import StartError
from trimtab.runtime.server import RunningServer
from trimtab_client.ragged import RaggedFloats, RaggedTokens
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reference_pb2, reference_pb2_grpc, tokens_pb2

TIMEOUT_S = 30
SEQUENCES = [[0, 7, 9, 12], [0, 5], [0, *range(5, 45)], [0, 30, 31, 32, 33, 34, 1]]
PROMPTS = [2, 1, 10, 3]


class Peer:
    """A running reference server and stubs that speak to it."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.stub = reference_pb2_grpc.ReferenceServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)

    async def info(self) -> model_pb2.ModelInfo:
        return (await self.models.GetModel(model_pb2.GetModelRequest(), timeout=TIMEOUT_S)).model

    async def logprobs(
        self, sequences: list[list[int]], prompts: list[int] | None, *, within_s: float = TIMEOUT_S, **fields
    ) -> reference_pb2.LogProbsResponse:
        if "tokenizer_digest" not in fields:
            fields["tokenizer_digest"] = (await self.info()).tokenizer_digest
        tokens = fields.pop("tokens", None) or RaggedTokens.from_sequences(sequences, prompts).to_proto()
        return await self.stub.LogProbs(reference_pb2.LogProbsRequest(tokens=tokens, **fields), timeout=within_s)


@asynccontextmanager
async def serving(folder: Path | str, **settings) -> AsyncIterator[Peer]:
    config = ReferenceConfig(**{"port": 0, "metrics_port": None, "threads": 1, "model": str(folder), **settings})
    async with (
        RunningServer(LABEL, config, services=SERVICES, load=load) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Peer(server, channel)


@pytest.fixture(scope="module")
def folder(make_tiny) -> Path:
    return make_tiny("policy", seed=4)


def own_forward(folder: Path, temperature: float) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """transformers' own log-probs, lse and entropy of each response, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    columns = ([], [], [])
    for sequence, prompt in zip(SEQUENCES, PROMPTS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0, prompt - 1 : -1] / temperature
        logp = torch.log_softmax(logits, dim=-1)
        columns[0].append(logp.gather(1, torch.tensor(sequence[prompt:])[:, None])[:, 0].numpy())
        columns[1].append(torch.logsumexp(logits, dim=-1).numpy())
        columns[2].append(-(logp.exp() * logp).sum(-1).numpy())
    return columns


async def refusal(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def field_of(error: grpc.aio.AioRpcError) -> str:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    status.details[0].Unpack(bad)
    return bad.field_violations[0].field


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_lse_and_entropy_equal_transformers_own_forward(folder, temperature):
    async with serving(folder) as peer:
        reply = await peer.logprobs(SEQUENCES, PROMPTS, temperature=temperature, include_lse=True, include_entropy=True)
    for message, want in zip((reply.logprobs, reply.lse, reply.entropy), own_forward(folder, temperature), strict=True):
        got = RaggedFloats.from_proto(message)
        assert got.lengths.tolist() == [2, 1, 31, 4]
        np.testing.assert_allclose(got.values, np.concatenate(want), atol=1e-5)
    assert reply.version.name == str(folder)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
HEADS = {
    "scaled logits": lambda size: GraniteForCausalLM(GraniteConfig(vocab_size=size, logits_scaling=3.0, **SMALL)),
    "capped logits": lambda size: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=size, head_dim=8, final_logit_softcapping=2.0, **SMALL)
    ),
    "head with a bias": lambda size: PhiForCausalLM(PhiConfig(vocab_size=size, **SMALL)),
}


@pytest.mark.parametrize("head", HEADS)
async def test_the_logit_scaling_of_each_family_counts(folder, tmp_path, head):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(5)
    model = HEADS[head](len(tokenizer))
    if head == "head with a bias":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    async with serving(tmp_path) as peer:
        reply = await peer.logprobs(SEQUENCES, PROMPTS, temperature=0.7)
    want = np.concatenate(own_forward(tmp_path, 0.7)[0])
    np.testing.assert_allclose(RaggedFloats.from_proto(reply.logprobs).values, want, atol=2e-5)


async def test_only_what_was_asked_for_travels_and_an_unset_temperature_is_1(folder):
    async with serving(folder) as peer:
        bare = await peer.logprobs(SEQUENCES, PROMPTS)
        one = await peer.logprobs(SEQUENCES, PROMPTS, temperature=1.0)
    assert not bare.HasField("lse")
    assert not bare.HasField("entropy")
    assert (bare.hidden, bare.hidden_size) == (b"", 0)
    assert bare.logprobs.values == one.logprobs.values


async def test_calls_of_different_temperatures_and_wishes_share_a_batch_without_mixing(folder):
    async with serving(folder) as peer:
        calls = [{"temperature": 0.5}, {"temperature": 2.0, "include_hidden": True}, {"include_entropy": True}]
        alone = [await peer.logprobs(SEQUENCES, PROMPTS, **call) for call in calls]
        together = await asyncio.gather(*(peer.logprobs(SEQUENCES, PROMPTS, **call) for call in calls))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(
            RaggedFloats.from_proto(one.logprobs).values, RaggedFloats.from_proto(other.logprobs).values, atol=1e-5
        )
        assert (len(one.hidden), len(one.entropy.values)) == (len(other.hidden), len(other.entropy.values))


async def test_logprobs_do_not_depend_on_batch_mates(folder):
    async with serving(folder) as peer:
        together = RaggedFloats.from_proto((await peer.logprobs(SEQUENCES, PROMPTS)).logprobs).split()
        for sequence, prompt, want in zip(SEQUENCES, PROMPTS, together, strict=True):
            alone = RaggedFloats.from_proto((await peer.logprobs([sequence], [prompt])).logprobs)
            np.testing.assert_allclose(alone.values, want, atol=1e-5)


async def test_hidden_states_are_bfloat16_and_give_the_logits_back(folder):
    async with serving(folder) as peer:
        reply = await peer.logprobs(SEQUENCES, PROMPTS, include_hidden=True)
    hidden = torch.frombuffer(bytearray(reply.hidden), dtype=torch.bfloat16).view(-1, reply.hidden_size).float()
    assert hidden.shape == (38, 32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = torch.tensor([token for ids, prompt in zip(SEQUENCES, PROMPTS, strict=True) for token in ids[prompt:]])
    logp = torch.log_softmax(model.lm_head(hidden), dim=-1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(
        logp.detach().numpy(), RaggedFloats.from_proto(reply.logprobs).values, atol=0.1, rtol=0.02
    )


async def test_an_empty_response_has_no_logprobs(folder):
    async with serving(folder) as peer:
        reply = await peer.logprobs([[0, 5, 6], [0, 5]], [3, 1])
    assert list(reply.logprobs.lengths) == [0, 1]


async def test_a_bad_request_is_refused_by_field(folder):
    async with serving(folder, limits=RequestLimits(max_sequences=4, max_tokens=100, max_message_bytes=4096)) as peer:
        contradiction = tokens_pb2.RaggedTokens(token_ids=bytes(8), lengths=[3], prompt_lengths=[1])
        long_prompt = tokens_pb2.RaggedTokens(token_ids=bytes(8), lengths=[2], prompt_lengths=[3])
        invalid, foreign = StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION
        table: list[tuple[list, list | None, dict, StatusCode, str]] = [
            ([], [], {}, invalid, "tokens.lengths"),
            ([[0, 1]], None, {}, invalid, "tokens.prompt_lengths"),
            ([[0, 1], [0, 1]], [1, 0], {}, invalid, "tokens.prompt_lengths"),
            ([], None, {"tokens": long_prompt}, invalid, "tokens.prompt_lengths"),
            ([], None, {"tokens": contradiction}, invalid, "tokens.lengths"),
            ([[0, 999]], [1], {}, invalid, "tokens.token_ids"),
            ([[0] * 65], [1], {}, invalid, "tokens.lengths"),
            ([[0] * 60] * 2, [1, 1], {}, invalid, "tokens.lengths"),
            ([[0, 1]] * 5, [1] * 5, {}, invalid, "tokens.lengths"),
            ([[0, 1]], [1], {"temperature": -1.0}, invalid, "temperature"),
            ([[0, 1]], [1], {"temperature": float("nan")}, invalid, "temperature"),
            ([[0, 1]], [1], {"tokenizer_digest": ""}, invalid, "tokenizer_digest"),
            ([[0, 1]], [1], {"tokenizer_digest": "blake3:other"}, foreign, "tokenizer_digest"),
            ([[0] * 64, [0] * 30], [1, 1], {"include_hidden": True}, invalid, "include_hidden"),
        ]
        for sequences, prompts, fields, code, field in table:
            error = await refusal(peer.logprobs(sequences, prompts, **fields))
            assert (error.code(), field_of(error)) == (code, field), error.details()


async def test_it_never_moves_and_refuses_pins_of_other_versions(folder):
    async with serving(folder) as peer:
        version = model_pb2.ModelVersion(run_id="sft", name="policy", step=3)
        loading = await refusal(peer.models.LoadVersion(model_pb2.LoadVersionRequest(version=version)))
        pinned = await refusal(peer.logprobs(SEQUENCES, PROMPTS, version=model_pb2.VersionPin(exact=version)))
    assert loading.code() == pinned.code() == StatusCode.FAILED_PRECONDITION


async def test_numbers_that_are_not_finite_are_an_error_that_names_the_sequence(make_tiny):
    def poison(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight.data[20] = float("nan")

    async with serving(make_tiny("policy", edit=poison, tie_word_embeddings=False)) as peer:
        bad = asyncio.create_task(peer.logprobs([[0, 5, 6], [0, 20, 6]], [1, 2]))
        good = asyncio.create_task(peer.logprobs([[0, 5, 6]], [1]))
        error = await refusal(bad)
        assert np.isfinite(RaggedFloats.from_proto((await good).logprobs).values).all()
    assert error.code() == StatusCode.INTERNAL
    assert "sequence 1:" in (error.details() or "")


async def test_what_cannot_be_served_is_refused_at_start(tmp_path):
    with pytest.raises(StartError, match=r"model: .*absent"):
        async with serving(tmp_path / "absent"):
            pytest.fail("it was served")


async def test_a_kernel_with_other_numbers_keeps_it_from_starting(monkeypatch, make_tiny):
    right = chunked_torch.head_forward

    def wrong(*args):
        statistics_4N, *kept = right(*args)
        return statistics_4N + 1e-3, *kept

    monkeypatch.setattr(chunked_torch, "head_forward", wrong)
    backends._torch.cache_clear()
    try:
        with pytest.raises(StartError, match="selected_logprobs"):
            async with serving(make_tiny("policy")):
                pytest.fail("it was served")
    finally:
        backends._torch.cache_clear()

"""The generator as its callers meet it: a real gRPC server, a real store, tiny random models."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.service import LABEL, SERVICES, load
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.server import RunningServer
from trimtab.weights.store import Store, open_store
from trimtab_client.v1 import generator_pb2 as pb
from trimtab_client.v1 import generator_pb2_grpc, model_pb2, model_pb2_grpc

VOCAB_SIZE = 259
MAX_LENGTH = 512
TIMEOUT_S = 30


def save_policy(folder: Path, seed: int, *, hidden: int = 32) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_LENGTH, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three policies of one architecture and tokenizer."""
    return [save_policy(tmp_path_factory.mktemp(f"policy{seed}"), seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path, folders: list[Path]) -> Store:
    """run/policy@1 and @2, of which 1 is current."""
    store = open_store(str(tmp_path / "store"))
    store.publish(folders[0], run_id="run", name="policy", step=1)
    store.publish(folders[1], run_id="run", name="policy", step=2, set_current=False)
    return store


class Client:
    """Raw stubs and a few shorthands."""

    def __init__(self, channel: grpc.aio.Channel, server: RunningServer) -> None:
        self._registry = server.context.metrics.registry
        self.generator = generator_pb2_grpc.GeneratorServiceStub(channel)
        self.model = model_pb2_grpc.ModelServiceStub(channel)

    def call(self, request: pb.GenerateRequest, timeout_s: float = TIMEOUT_S) -> grpc.aio.UnaryStreamCall:
        return self.generator.Generate(request, timeout=timeout_s)

    async def generate(self, prompts: list[Any], *, version: Any = None, **sampling: Any) -> list[pb.Completion]:
        call = self.call(request_of(prompts, version=version, **sampling))
        return [response.completion async for response in call]

    def metric(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(name, labels)

    async def served(self) -> model_pb2.ModelInfo:
        return (await self.model.GetModel(model_pb2.GetModelRequest())).model

    async def move_to(self, step: int) -> model_pb2.ModelInfo:
        version = model_pb2.ModelVersion(run_id="run", name="policy", step=step)
        return (await self.model.LoadVersion(model_pb2.LoadVersionRequest(version=version), timeout=TIMEOUT_S)).model


def request_of(prompts: list[Any], *, version: Any = None, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompts=[prompt if isinstance(prompt, pb.Prompt) else ids_prompt(prompt) for prompt in prompts],
        sampling=pb.SamplingParameters(**sampling),
        version=version,
    )


def ids_prompt(ids: Any, **fields: Any) -> pb.Prompt:
    return pb.Prompt(token_ids=np.asarray(list(ids), dtype="<i4").tobytes(), **fields)


def tokens_of(completion: pb.Completion) -> list[int]:
    return np.frombuffer(completion.token_ids, dtype="<i4").tolist()


def steps_of(completion: pb.Completion) -> list[tuple[int, int]]:
    return [(run.version.step, run.token_count) for run in completion.versions]


@asynccontextmanager
async def serving(model: str | Path, **settings: Any) -> AsyncIterator[Client]:
    config = GeneratorConfig(model=str(model), **{"port": 0, "metrics_port": None, "threads": 1, **settings})
    async with (
        RunningServer(LABEL, config, services=SERVICES, load=load) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Client(channel, server)


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 (the conditions are metrics, which nobody announces)
            await asyncio.sleep(0.005)


def details(error: grpc.aio.AioRpcError) -> list[Any]:
    raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    found = []
    for packed in status_pb2.Status.FromString(raw).details if raw else []:
        for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                message = kind()
                packed.Unpack(message)
                found.append(message)
    return found


def full_logprobs(folder: Path, completion: pb.Completion, temperature: float) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    prompt = np.frombuffer(completion.prompt_token_ids, dtype="<i4").tolist()
    ids = torch.tensor([prompt + tokens_of(completion)])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


async def test_completions_carry_what_the_contract_says(folders: list[Path]) -> None:
    async with serving(folders[0]) as client:
        prompts = [range(5), range(40, 60), [7]]
        got = await client.generate(prompts, n=2, max_tokens=9, temperature=0.8, ignore_eos=True, seed=4)
    assert {(c.prompt_index, c.sample_index) for c in got} == {(p, s) for p in range(3) for s in range(2)}
    assert len({c.seed for c in got}) == 6
    for completion in got:
        prompt = list(prompts[completion.prompt_index])
        assert np.frombuffer(completion.prompt_token_ids, "<i4").tolist() == prompt
        assert len(tokens_of(completion)) == 9 and completion.finish_reason == pb.FINISH_REASON_LENGTH
        logprobs = np.frombuffer(completion.logprobs, "<f4")
        np.testing.assert_allclose(logprobs, full_logprobs(folders[0], completion, 0.8), atol=1e-4)
        (run,) = completion.versions
        assert (run.token_count, run.version.name, run.version.run_id) == (9, str(folders[0]), "")


async def test_the_same_seed_gives_the_same_tokens(folders: list[Path]) -> None:
    async with serving(folders[0], max_slots=3) as client:
        by_call = [await client.generate([range(6), range(9)], n=3, max_tokens=15, seed=11) for _ in range(2)]
        keyed = [{(c.prompt_index, c.sample_index): (c.seed, tokens_of(c)) for c in got} for got in by_call]
        assert keyed[0] == keyed[1]
        assert len({tuple(tokens) for _, tokens in keyed[0].values()}) == 6
        # A completion's seed is enough to have it again, in other company.
        seed, tokens = keyed[0][(1, 2)]
        again = await client.generate([ids_prompt(range(9), seeds=[seed]), range(30)], max_tokens=15)
        assert next(tokens_of(c) for c in again if c.prompt_index == 0) == tokens
        free = [await client.generate([range(6)], max_tokens=15) for _ in range(2)]
        assert tokens_of(free[0][0]) != tokens_of(free[1][0])


async def test_text_and_chat_prompts_are_encoded_by_the_models_own_tokenizer(folders: list[Path]) -> None:
    chat = pb.Prompt()
    chat.chat.messages.add(role="user", content="hi")
    async with serving(folders[0]) as client:
        got = await client.generate([pb.Prompt(text="hello"), chat], max_tokens=4, temperature=0)
        prompts = {c.prompt_index: np.frombuffer(c.prompt_token_ids, "<i4").tolist() for c in got}
        ids = await client.generate([prompts[0], prompts[1]], max_tokens=4, temperature=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[0])
    assert prompts == {0: tokenizer.encode("hello"), 1: tokenizer.encode("user: hi\nassistant: ")}
    assert {c.prompt_index: (tokens_of(c), c.text) for c in got} == {
        c.prompt_index: (tokens_of(c), c.text) for c in ids
    }


async def test_each_completion_is_sent_as_it_finishes(folders: list[Path]) -> None:
    async with serving(folders[0]) as client:
        long = client.call(request_of([range(9)], max_tokens=500, ignore_eos=True))
        first = asyncio.ensure_future(long.read())
        short = [await client.generate([range(4)], max_tokens=2) for _ in range(3)]
        assert len(short) == 3 and not first.done()
        long.cancel()
        # Within one call, too: a sequence that stops early does not wait for the others.
        tokens = tokens_of((await client.generate([range(9)], max_tokens=500, seed=1, ignore_eos=True))[0])
        stops = request_of([range(9)], n=2, max_tokens=500, seed=1, ignore_eos=True, stop_token_ids=[tokens[5]])
        lengths = [len(tokens_of(response.completion)) async for response in client.call(stops)]
        assert lengths == sorted(lengths) and lengths[0] <= 6


async def test_a_cancelled_call_frees_its_slots(folders: list[Path]) -> None:
    async with serving(folders[0], max_slots=2, queue_limit=4) as client:
        long = request_of([range(9)] * 6, max_tokens=500, ignore_eos=True)
        call = client.call(long)
        reading = asyncio.ensure_future(call.read())
        await wait_until(lambda: client.metric("trimtab_queue_depth") == 4)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generate([[1]], max_tokens=1)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(details(refused.value)[0], error_details_pb2.RetryInfo)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await wait_until(lambda: client.metric("trimtab_queue_depth") == 0)
        assert len(await client.generate([[1]] * 2, max_tokens=1)) == 2
        # More than the queue could ever hold: nothing to wait for.
        with pytest.raises(grpc.aio.AioRpcError) as hopeless:
            await client.generate([[1]] * 9, max_tokens=1)
        assert hopeless.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and details(hopeless.value) == []


async def test_an_expired_deadline_stops_the_work(folders: list[Path]) -> None:
    async with serving(folders[0], max_slots=1) as client:
        call = client.call(request_of([range(9)] * 8, max_tokens=500, ignore_eos=True), timeout_s=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            _ = [response async for response in call]
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(await client.generate([[1]], max_tokens=1)) == 1
        assert client.metric("trimtab_sequences_total") is not None
        assert client.metric("trimtab_queue_depth") == 0


BAD = [
    ("prompts", {"prompts": []}),
    ("prompts[1]", {"prompts": [[1], pb.Prompt()]}),
    ("prompts[1].token_ids", {"prompts": [[1], []]}),
    ("prompts[0].token_ids", {"prompts": [pb.Prompt(token_ids=b"\x01\x00\x00")]}),
    ("prompts[2].token_ids", {"prompts": [[1], [2], [3, VOCAB_SIZE]]}),
    ("prompts[0].token_ids", {"prompts": [[-1]]}),
    ("prompts[1].token_ids", {"prompts": [[1], range(5, 5 + 200), [1]]}),
    ("prompts[0].text", {"prompts": [pb.Prompt(text="x" * 100)]}),
    ("prompts[0].text", {"prompts": [pb.Prompt(text="")]}),
    ("prompts[0].chat", {"prompts": [pb.Prompt(chat={})]}),
    ("prompts[0].seeds", {"prompts": [ids_prompt([1], seeds=[1, 2])], "n": 3}),
    ("prompts", {"prompts": [[1]] * 17}),
    ("sampling.n", {"prompts": [[1]] * 2, "n": 9}),
    ("sampling.temperature", {"temperature": float("nan")}),
    ("sampling.temperature", {"temperature": float("inf")}),
    ("sampling.temperature", {"temperature": -1.0}),
    ("sampling.temperature", {"temperature": 1e-6}),
    ("sampling.top_p", {"top_p": 0.0}),
    ("sampling.top_p", {"top_p": 1.5}),
    ("sampling.top_p", {"top_p": float("nan")}),
    ("sampling.min_tokens", {"min_tokens": 5, "max_tokens": 4}),
    ("sampling.stop_token_ids[1]", {"stop_token_ids": [1, VOCAB_SIZE]}),
    ("sampling.stop_token_ids[0]", {"stop_token_ids": [-1]}),
    ("sampling.stop[1]", {"stop": ["a", ""]}),
    ("sampling.stop", {"stop": ["a"] * 65}),
]


async def test_bad_input_is_refused_by_the_name_of_its_field(folders: list[Path]) -> None:
    limits = RequestLimits(max_sequences=16)
    async with serving(folders[0], max_length=100, limits=limits) as client:
        for field, arguments in BAD:
            arguments = {"prompts": [[1]], **arguments}
            if arguments["prompts"] and isinstance(arguments["prompts"][-1], range):
                arguments["prompts"] = [list(prompt) for prompt in arguments["prompts"]]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.generate(**arguments)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (field, refused.value.details())
            (problem,) = details(refused.value)
            assert problem.field_violations[0].field == field, refused.value.details()
        assert len(await client.generate([[1]], max_tokens=1)) == 1


@pytest.mark.parametrize("mode", ["drain", "keep", "recompute_kv"])
async def test_a_swap_under_load_fails_no_request_and_marks_every_token(
    folders: list[Path], store: Store, mode: str
) -> None:
    async with serving("version:run/policy@1", store=store.url, swap_mode=mode, max_slots=6) as client:

        async def load_it(seed: int) -> list[pb.Completion]:
            prompts = [range(seed % 7 + 1), range(30)]
            return await client.generate(prompts, n=2, max_tokens=60, seed=seed, ignore_eos=True)

        calls = [asyncio.ensure_future(load_it(seed)) for seed in range(8)]
        await wait_until(lambda: (client.metric("trimtab_sequences_total") or 0) > 2)
        info = await client.move_to(2)
        assert (info.version.step, (await client.served()).version.step) == (2, 2)
        after = await client.generate([range(4)], max_tokens=3, ignore_eos=True)
        completions = [completion for call in calls for completion in await call]
    assert len(completions) == 8 * 4 and steps_of(after[0]) == [(2, 3)]
    seen = {tuple(step for step, _ in steps_of(completion)) for completion in completions}
    assert {(1,), (2,)} <= seen
    assert ((1, 2) in seen) == (mode != "drain")
    models = {step: LlamaForCausalLM.from_pretrained(folders[step - 1]).eval() for step in (1, 2)}
    for completion in completions:
        assert sum(count for _, count in steps_of(completion)) == 60
        runs = steps_of(completion)
        checked = runs if mode == "recompute_kv" else runs[:1]
        start = 0
        for step, count in checked:
            expected = full_logprobs_of(models[step], completion)[start : start + count]
            got = np.frombuffer(completion.logprobs, "<f4")[start : start + count]
            np.testing.assert_allclose(got, expected, atol=1e-4)
            start += count


def full_logprobs_of(model: LlamaForCausalLM, completion: pb.Completion) -> np.ndarray:
    prompt = np.frombuffer(completion.prompt_token_ids, dtype="<i4").tolist()
    ids = torch.tensor([prompt + tokens_of(completion)])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


async def test_the_followed_pointer_is_served_and_a_roll_back_too(folders: list[Path], store: Store) -> None:
    settings = {"store": store.url, "follow": "run/policy", "poll_interval_s": 0.02}
    async with serving("version:run/policy", **settings) as client:
        assert (await client.served()).version.step == 1
        pin = model_pb2.VersionPin(at_least_step=3)
        waiting = asyncio.ensure_future(client.generate([[5, 6]], max_tokens=4, version=pin, ignore_eos=True))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        store.publish(folders[2], run_id="run", name="policy", step=3)
        assert steps_of((await waiting)[0]) == [(3, 4)]
        store.set_current("run", "policy", 1)
        await wait_until(lambda: client.metric("trimtab_model_step") == 1)
        assert steps_of((await client.generate([[5, 6]], max_tokens=4, ignore_eos=True))[0]) == [(1, 4)]


async def test_a_broken_version_is_refused_counted_and_the_old_one_served_on(
    folders: list[Path], store: Store, tmp_path: Path
) -> None:
    nan = tmp_path / "nan"
    model = LlamaForCausalLM.from_pretrained(folders[0])
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(nan)
    PreTrainedTokenizerFast.from_pretrained(folders[0]).save_pretrained(nan)
    store.publish(nan, run_id="run", name="policy", step=3, set_current=False)
    store.publish(save_policy(tmp_path / "wide", 0, hidden=64), run_id="run", name="policy", step=4, set_current=False)
    damaged = store.fetch(store.get("run", "policy", 2)) / "model.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    async with serving("version:run/policy@1", store=store.url) as client:
        before = await client.generate([range(5)], max_tokens=6, seed=3)
        for step, code, word in (
            (2, grpc.StatusCode.DATA_LOSS, "safetensors"),
            (3, grpc.StatusCode.DATA_LOSS, "not finite"),
            (4, grpc.StatusCode.FAILED_PRECONDITION, "shape"),
            (9, grpc.StatusCode.NOT_FOUND, "9"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.move_to(step)
            assert refused.value.code() == code and word in str(refused.value.details())
        assert (await client.served()).version.step == 1
        assert client.metric("trimtab_version_loads_total", result="failed") == 4
        after = await client.generate([range(5)], max_tokens=6, seed=3)
        assert tokens_of(after[0]) == tokens_of(before[0]) and steps_of(after[0]) == [(1, 6)]


async def test_pins_are_honoured_or_refused(folders: list[Path], store: Store) -> None:
    async with serving("version:run/policy@1", store=store.url, swap_mode="keep") as client:
        exact = [model_pb2.VersionPin(exact={"run_id": "run", "step": step}) for step in (0, 1, 2)]
        held = asyncio.ensure_future(
            client.generate([range(8)], n=3, max_tokens=200, version=exact[1], ignore_eos=True)
        )
        await asyncio.sleep(0.1)
        await client.move_to(2)
        assert all(steps_of(completion) == [(1, 200)] for completion in await held)
        assert steps_of((await client.generate([[1]], max_tokens=2, version=exact[2], ignore_eos=True))[0]) == [(2, 2)]
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await client.generate([[1]], max_tokens=2, version=exact[1])
        assert gone.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        future = request_of([[1]], version=model_pb2.VersionPin(at_least_step=9), max_tokens=1)
        with pytest.raises(grpc.aio.AioRpcError) as unserved:
            _ = [response async for response in client.call(future, timeout_s=0.6)]
        assert unserved.value.code() == grpc.StatusCode.UNAVAILABLE
        assert isinstance(details(unserved.value)[0], error_details_pb2.RetryInfo)


async def test_get_model_says_what_is_served(folders: list[Path]) -> None:
    async with serving(folders[0], max_length=77) as client:
        info = await client.served()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.move_to(2)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert (info.vocab_size, info.max_length, info.dtype) == (VOCAB_SIZE, 77, "float32")
    assert (info.architecture, list(info.eos_token_ids)) == ("LlamaForCausalLM", [257])
    assert info.has_chat_template and info.tokenizer_digest.startswith("blake3:") and info.parameter_count > 0


async def test_a_drain_finishes_what_is_in_flight(folders: list[Path]) -> None:
    config = GeneratorConfig(model=str(folders[0]), port=0, metrics_port=None, threads=1)
    async with (
        RunningServer(LABEL, config, services=SERVICES, load=load) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        client = Client(channel, server)
        call = asyncio.ensure_future(client.generate([range(9)], n=4, max_tokens=300, ignore_eos=True))
        await wait_until(lambda: client.metric("trimtab_requests_in_flight") == 1)
        await server.drain()
        assert [len(tokens_of(completion)) for completion in await call] == [300] * 4

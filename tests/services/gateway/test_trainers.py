"""Other trainers' own client code gets the reward service's scores: OpenRLHF's and verl's, and our adapters in them."""

import ast
import asyncio
import importlib
import inspect
import json
import logging
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.services.gateway.conftest import gateway
from tests.services.gateway.peers.wheels import unpacked
from trimtab_client import AsyncRewardClient
from trimtab_client.adapters.openrlhf import OpenRlhfReward, split_query
from trimtab_client.adapters.trl import TrlReward
from trimtab_client.adapters.verl import VerlReward

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT, RESPONSE = "w1 w2", " w3 w4"
CHAT = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
async def own(upstreams) -> dict[str, float]:
    """What the reward service itself says of the pair and of the conversation."""
    async with AsyncRewardClient(upstreams["reward"]) as client:
        pair = await client.score_texts([(PROMPT, RESPONSE), ("", PROMPT + RESPONSE)])
        chat = await client.score_chats([[*CHAT, {"role": "assistant", "content": "w3"}]])
    return {"pair": float(pair.scores[0]), "text": float(pair.scores[1]), "chat": float(chat.scores[0])}


@pytest.fixture
def openrlhf_executor(monkeypatch) -> Any:
    """OpenRLHF's SingleTurnAgentExecutor, unchanged; its package's own __init__, which wants a GPU's tools, is left."""
    folder = unpacked("openrlhf", "0.11.2")
    for name in ("openrlhf", "openrlhf.utils"):
        bare = types.ModuleType(name)
        bare.__path__ = [str(folder.joinpath(*name.split(".")))]
        monkeypatch.setitem(sys.modules, name, bare)
    yield importlib.import_module("openrlhf.utils.agent").SingleTurnAgentExecutor
    for name in [name for name in sys.modules if name.startswith("openrlhf.")]:
        sys.modules.pop(name)


async def test_openrlhf_s_own_remote_reward_request_is_answered(upstreams, own, openrlhf_executor):
    async with gateway(**upstreams, strip_special=["<s>", "</s>"]) as edge:
        asking = openrlhf_executor(remote_rm_url=[f"{edge.url}/get_reward"])
        query = f"<s>{PROMPT}{RESPONSE}</s>"
        (found,) = await asking._fetch_rewards_via_http([query], [PROMPT], ["label"])
    told = found[0] if isinstance(found, list) else found
    value = told["rewards"][0] if isinstance(told["rewards"], list) else told["rewards"]
    assert float(value) == pytest.approx(own["pair"], rel=1e-5)


async def test_openrlhf_calls_our_reward_function_from_a_file(upstreams, own, openrlhf_executor, tmp_path):
    file = tmp_path / "my_reward.py"
    file.write_text(
        "from trimtab_client.adapters.openrlhf import OpenRlhfReward\n"
        f"reward_func = OpenRlhfReward({upstreams['reward']!r})\n"
    )
    asking = openrlhf_executor(remote_rm_url=str(file))
    (found,) = await asking._fetch_rewards_via_func([PROMPT + RESPONSE], [PROMPT], ["label"])
    assert float(found["rewards"][0]) == pytest.approx(own["pair"], rel=1e-5)
    asking.reward_func.close()


async def test_a_query_is_split_behind_its_prompt_and_special_tokens_come_off_its_ends_only():
    assert split_query("<s><s>a b</s>", "<s>a", ("<s>", "</s>")) == ("a", " b")
    assert split_query("a <s> b", "a", ("<s>",)) == ("a", " <s> b")
    assert split_query("something else", "a") == ("", "something else")
    assert split_query("a b", "") == ("", "a b")


def _verl_client() -> Any:
    """verl's own methods that ask a reward model, taken unchanged from its source: its module imports Ray and more."""
    source = unpacked("verl", "0.9.1") / "verl" / "experimental" / "reward_loop" / "reward_loop.py"
    tree = ast.parse(source.read_text())
    (worker,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "RewardLoopWorker")
    wanted = ("_post_request", "compute_score_disrm")
    worker.body = [n for n in worker.body if isinstance(n, ast.AsyncFunctionDef) and n.name in wanted]
    for method in worker.body:
        for argument in method.args.args:  # type: ignore[attr-defined]
            argument.annotation = None
    names = {"asyncio": asyncio, "aiohttp": aiohttp, "logger": logging.getLogger("verl")}
    exec(compile(ast.Module([worker], []), str(source), "exec"), names)
    return names["RewardLoopWorker"]


async def test_verl_s_own_reward_model_client_is_answered_by_classify(upstreams, own):
    async with gateway(**upstreams, reward_names=["reward", "org/my-rm"]) as edge:
        asking = _verl_client()()
        asking.reward_router_address = edge.url.removeprefix("http://")
        model = types.SimpleNamespace(model_path="org/my-rm", rollout=types.SimpleNamespace(name="vllm"))
        asking.config = types.SimpleNamespace(reward=types.SimpleNamespace(reward_model=model))

        async def prompt(data: Any) -> str:
            return PROMPT + RESPONSE

        asking._preprocess_reward_inputs = prompt
        found = await asking.compute_score_disrm(None)
    assert found["reward_score"] == pytest.approx(own["text"], rel=1e-5)


async def test_the_verl_reward_function_is_called_as_verl_calls_it(upstreams, own):
    reward = VerlReward(upstreams["reward"])
    assert inspect.iscoroutinefunction(reward.compute_score)  # verl awaits it, rather than holding a thread
    asked = {"data_source": "x", "ground_truth": "", "solution_str": RESPONSE}
    found = await reward.compute_score(**asked, extra_info={"prompt": PROMPT, "num_turns": 1})
    assert found["score"] == pytest.approx(own["pair"], rel=1e-5)
    chat = await reward.compute_score(**asked | {"solution_str": "w3"}, extra_info={"prompt": CHAT})
    assert chat["score"] == pytest.approx(own["chat"], rel=1e-5)
    with pytest.raises(KeyError, match="the data set must"):
        await reward.compute_score(**asked, extra_info={})


async def test_the_trl_reward_function_takes_texts_and_conversations_and_travels_to_workers(upstreams, own):
    reward = pickle.loads(pickle.dumps(TrlReward(upstreams["reward"], name="helpful")))
    assert reward.__name__ == "helpful"

    def ask() -> tuple[list[float], list[float]]:
        columns = {"completion_ids": [[1], [2]], "trainer_state": None}
        texts = reward(prompts=[PROMPT, ""], completions=[RESPONSE, PROMPT + RESPONSE], **columns)
        chats = reward(prompts=[CHAT], completions=[[{"role": "assistant", "content": "w3"}]])
        reward.close()
        return texts, chats

    texts, chats = await asyncio.to_thread(ask)
    assert texts == pytest.approx([own["pair"], own["text"]], rel=1e-5)
    assert chats == pytest.approx([own["chat"]], rel=1e-5)


async def test_classify_puts_a_sigmoid_over_the_logit_only_where_it_is_asked_for(edge, own):
    text = PROMPT + RESPONSE
    plain = (await edge.http.post("/classify", json={"input": [text, text]})).json()
    assert [one["probs"][0] for one in plain["data"]] == pytest.approx([own["text"]] * 2, rel=1e-5)
    (one,) = (await edge.http.post("/classify", json={"input": text, "use_activation": True})).json()["data"]
    assert 0 < one["probs"][0] < 1 and one["num_classes"] == 1


async def test_adapters_import_nothing_of_the_trainers():
    for module in ("openrlhf", "trl", "verl", "scoring"):
        source = Path(inspect.getfile(OpenRlhfReward)).parent / f"{module}.py"
        tops = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        named = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in tops}
        assert not any(name.split(".")[0] in ("torch", "trl", "verl", "openrlhf") for name in named)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_trl_s_grpo_trainer_takes_its_rewards_from_the_service(upstreams, policy_folder, tmp_path):
    output = tmp_path / "out"
    script = Path(__file__).parent / "peers" / "trl_trains.py"
    command = [sys.executable, str(script), str(unpacked("trl", "1.12.0")), str(policy_folder), upstreams["reward"]]
    process = await asyncio.create_subprocess_exec(
        *command, str(output), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 280)
    assert process.returncode == 0, err.decode()[-3000:]
    told = json.loads(out.splitlines()[-1])
    rewards = []
    async with AsyncRewardClient(upstreams["reward"]) as client:
        for prompts, completions, found in told["asked"]:
            own = await client.score_texts(list(zip(prompts, completions, strict=True)))
            assert found == pytest.approx(own.scores.tolist(), rel=1e-5)
            rewards += found
    assert len(rewards) >= 4
    assert told["logged"][0]["rewards/helpful/mean"] == pytest.approx(sum(rewards[:4]) / 4, rel=1e-4)

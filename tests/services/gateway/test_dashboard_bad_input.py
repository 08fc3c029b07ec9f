"""Wrong bodies, queries and headers at every route of the dashboard: each refusal is typed and names a field."""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from tests.services.gateway.conftest import PORTS, Edge, gateway
from tests.services.gateway.mutations import mutated
from trimtab.gateway.guard import OPEN_BODY_BYTES
from trimtab.runtime.server import RunningServer
from trimtab.trainer import service as trainer_service
from trimtab.trainer.config import TrainerConfig
from trimtab.weights.store import open_store

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODIES = [
    ("/dashboard/session", {"token": "tt_one"}),
    ("/dashboard/answer", {"prompt": "w1 " * 60}),
    ("/dashboard/roll-back", {"run_id": "run", "name": "policy", "step": 1}),
]
QUERIES = {
    "/dashboard": ["run_id"],
    "/dashboard/samples": ["run_id", "step", "every"],
    "/dashboard/events": ["run_id", "after"],
    "/dashboard/versions": ["other"],
    "/dashboard/people": ["other"],
}
STRANGE = ["", "-1", "1", "1.5", "x", "٣", "9" * 30, "9" * 5000, str(2**63), "%00", "../..", "a" * 200, "nan", "ü"]


@pytest.fixture(scope="module")
async def watched(upstreams, reward_folder, tmp_path_factory) -> AsyncIterator[Edge]:
    """A gateway open to all, before a trainer, with a store of one version."""
    folder = tmp_path_factory.mktemp("watched")
    store = str(folder / "store")
    open_store(store).publish(reward_folder, run_id="run", name="policy", step=1)
    config = TrainerConfig(**PORTS, threads=1, folder=folder / "runs", store=store)
    trainer = RunningServer("trainer", config, services=trainer_service.SERVICES, load=trainer_service.load)
    async with trainer, gateway(**upstreams, trainer=trainer.address, store=store) as edge:
        yield edge


async def test_mutated_bodies_are_answered_or_refused_by_field(watched):
    random_, seen = random.Random(4), Counter[int]()
    for number in range(150):
        path, body = BODIES[number % len(BODIES)]
        content, kind = mutated(body, random_)
        answer = await watched.http.post(path, content=content, headers={"content-type": "application/json"})
        told = f"{path} {kind} {content[:300]!r} → {answer.status_code} {answer.text[:300]}"
        too_large = path == "/dashboard/session" and len(content) > OPEN_BODY_BYTES
        assert answer.status_code in ((413,) if too_large else (200, 400, 404, 422)), told
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and (error["field"] or answer.status_code == 404), told
        seen[answer.status_code] += 1
    assert seen[422] > 50 and seen[200] > 5


async def test_strange_queries_are_answered_or_refused_by_field(watched):
    seen = Counter[int]()
    for page, names in QUERIES.items():
        for name in names:
            for value in STRANGE:
                answer = await watched.http.get(page, params={name: value})
                told = f"{page} {name}={value[:40]!r} → {answer.status_code} {answer.text[:300]}"
                assert answer.status_code in (200, 422), told
                if answer.status_code == 422:
                    assert json.loads(answer.text)["error"]["field"], told
                elif page.endswith("events"):
                    assert answer.text.startswith("event: trouble\n"), told
                seen[answer.status_code] += 1
    assert seen[422] > 30

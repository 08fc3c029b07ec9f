"""Every roll back that somebody tried on the dashboard is in the audit log, with what came of it."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.services.gateway.conftest import Edge, gateway
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.keys import add_key
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store, open_store

BACK = {"run_id": "run", "name": "policy", "step": 1}


@dataclass(frozen=True)
class Room:
    """A gateway before a store whose policy has steps 1 and 2, and its audit file."""

    edge: Edge
    store: Store
    audit_file: Path
    tokens: dict[str, str]

    async def asked(self, person: str, **changes: Any) -> int:
        headers = {"authorization": f"Bearer {self.tokens[person]}"}
        answer = await self.edge.http.post("/dashboard/roll-back", json=BACK | changes, headers=headers)
        return answer.status_code

    @property
    def acts(self) -> list[tuple[str, str, str, str, str]]:
        lines = self.audit_file.read_text().splitlines()
        return [tuple(json.loads(line)[key] for key in ("who", "what", "target", "outcome", "peer")) for line in lines]

    @property
    def current(self) -> int:
        version = self.store.current_version("run", "policy")
        assert version is not None
        return version.step


@pytest.fixture
async def room(policy_folder, tmp_path) -> AsyncIterator[Room]:
    store = open_store(str(tmp_path / "store"))
    for step in (1, 2):
        store.publish(policy_folder, run_id="run", name="policy", step=step)
    keys = tmp_path / "keys.yaml"
    tokens = {name: add_key(keys, name, roles)[1] for name, roles in (("ann", ["train"]), ("root", ["admin"]))}
    auth = AuthConfig(keys_file=keys, audit_file=tmp_path / "audit.jsonl")
    async with gateway(trainer="127.0.0.1:1", store=store.url, auth=auth) as edge:
        yield Room(edge, store, tmp_path / "audit.jsonl", tokens)


def act(who: str, outcome: str, target: str = "run/policy@1") -> tuple[str, str, str, str, str]:
    return (f"key:{who}", "roll back", target, outcome, "127.0.0.1")


async def test_what_was_done_and_refused_is_noted_with_who_and_from_where(room: Room):
    assert [await room.asked("ann"), await room.asked("root", step=9), await room.asked("root", run_id="../x")] == [
        403,
        404,
        400,
    ]
    assert room.current == 2 and await room.asked("root") == 200 and room.current == 1
    assert room.acts == [
        act("ann", "PERMISSION_DENIED", ""),
        act("root", "NOT_FOUND", "run/policy@9"),
        act("root", "INVALID_ARGUMENT", "../x/policy@1"),
        act("root", "OK"),
    ]
    assert not any(token in room.audit_file.read_text() for token in room.tokens.values())


async def test_what_failed_in_an_unexpected_way_is_not_noted_as_done(room: Room, monkeypatch):
    def broken(*_: object) -> Manifest:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Store, "set_current", broken)
    assert await room.asked("root") == 500
    assert room.acts == [act("root", "INTERNAL")]


@pytest.mark.parametrize(("ends", "outcome", "current"), [(True, "OK", 1), (False, "INTERNAL", 2)])
async def test_what_came_of_it_is_noted_though_the_caller_has_hung_up(room: Room, monkeypatch, ends, outcome, current):
    release = threading.Event()
    real: Callable[..., Manifest] = Store.set_current

    def slow(*asked: Any) -> Manifest:
        release.wait(20)
        if not ends:
            raise RuntimeError("nobody thought of this")
        return real(*asked)

    monkeypatch.setattr(Store, "set_current", slow)
    room.edge.http.timeout = httpx2.Timeout(10, read=0.3)
    with pytest.raises(httpx2.ReadTimeout):
        await room.asked("root")
    await asyncio.sleep(0.2)
    assert room.acts == [] and room.current == 2
    release.set()
    async with asyncio.timeout(10):
        while not room.acts:  # noqa: ASYNC110 (a file has no event)
            await asyncio.sleep(0.02)
    assert room.acts == [act("root", outcome)] and room.current == current

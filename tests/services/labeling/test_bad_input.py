"""Mutated bodies at every route of labeling's API that takes one: each refusal is typed and names a field."""

import json
import random
from collections import Counter

import pytest
from fastapi.testclient import TestClient

from tests.services.gateway.mutations import mutated
from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.labelers import add_labeler
from trimtab.labeling.vocabulary import Role
from trimtab.labeling.web.app import create_app
from trimtab.labeling.web.room import Room

ROW = {"prompt": "Eggs?", "responses": ["boil", "fry"], "ranks": [2, 1], "labeler": "ann", "task": "eggs"}

OPEN_ROW = {"prompt": "Ham?", "responses": ["yes", "no"]}


@pytest.fixture
def send(database, now):
    """send(method, path, content): with the token of the one admin."""
    with database.write() as session:
        token = add_labeler(session, "root", Role.ADMIN, now)[1]
    client = TestClient(create_app(Room(database, LabelingConfig(), lambda: now)), raise_server_exceptions=False)
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    return lambda method, path, content: client.request(method, f"/api/v1{path}", content=content, headers=headers)


def test_mutated_bodies_are_answered_or_refused_by_field(send):
    campaign = {"name": "kitchen", "overlap": 1, "guideline": "Choose.", "quota": 100}
    assert send("POST", "/campaigns", json.dumps(campaign)).status_code == 201
    assert send("POST", "/campaigns/kitchen/rows", json.dumps(ROW)).status_code in (200, 201)
    assert send("POST", "/campaigns/kitchen/rows", json.dumps(OPEN_ROW)).status_code in (200, 201)
    leased = send("POST", "/campaigns/kitchen/next", b"{}").json()
    bodies = [
        ("POST", "/campaigns", campaign | {"name": "other"}),
        ("PATCH", "/campaigns/kitchen", {"guideline": "Choose well.", "overlap": 2}),
        ("POST", "/campaigns/kitchen/rows", ROW),
        ("POST", f"/tasks/{leased['id']}/judgment", {"ranks": [1, 2], "ratings": [5, 3], "key": "k1"}),
        ("POST", f"/tasks/{leased['id']}/skip", {"reason": "other"}),
        ("POST", "/labelers", {"name": "ann", "role": "labeler"}),
        ("PUT", "/labelers/ann/role", {"role": "lead"}),
    ]
    random_, seen, wrong = random.Random(5), Counter(), {}
    for number in range(400):
        method, path, body = bodies[number % len(bodies)]
        content, kind = mutated(body, random_)
        answer = send(method, path, content)
        told = f"{method} {path} {kind} {content[:300]!r} → {answer.status_code} {answer.text[:300]}"
        if answer.status_code not in (200, 201, 204, 400, 404, 409, 422):
            wrong[f"{path} {answer.status_code}"] = told
        elif answer.status_code >= 400:
            error = answer.json()["error"]
            if not error["message"] or not (error["field"] or answer.status_code in (404, 409)):
                wrong[f"{path} {answer.status_code}"] = told
        seen[answer.status_code] += 1
    assert not wrong, "\n".join(wrong.values())
    assert seen[422] + seen[400] > 150
    assert send("GET", "/me", b"").status_code == 200

"""The REST API, sessions that end, and rows in and out."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient

from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.labelers import add_labeler
from trimtab.labeling.vocabulary import Role
from trimtab.labeling.web.app import create_app
from trimtab.labeling.web.room import Room
from trimtab.trainer.data.load import load_demonstrations, load_rankings

RANKED = [
    {"prompt": "Eggs?", "responses": ["boil", "fry", "raw", "boil 5 min"], "ranks": [2, 2, 3, 1], "labeler": "ann"},
    {
        "messages": [{"role": "user", "content": "嗨 \u2028 hi"}],
        "responses": ["你好", "", "hi", "bye"],
        "ranks": [1, 4, 1, 3],
        "ratings": [7, None, 6, 2],
        "flags": [[], ["fails_instruction"], [], []],
        "ended": [True, False, True, True],
        "versions": ["a", "a", "b", "b"],
        "order_shown": [3, 1, 0, 2],
        "labeler": "bob",
        "task": "hello",
        "seconds": 31.5,
    },
]


@pytest.fixture
def clock():
    class Clock:
        now = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def call(database, clock):
    """call(method, path, who="root", **options): one API call with that person's bearer token."""
    with database.write() as session:
        roles = {"root": Role.ADMIN, "lea": Role.LEAD, "kim": Role.LABELER}
        tokens = {name: add_labeler(session, name, role, clock())[1] for name, role in roles.items()}
    client = TestClient(create_app(Room(database, LabelingConfig(), clock)), follow_redirects=False)

    def do(method: str, path: str, who: str = "root", **options):
        headers = {"authorization": f"Bearer {tokens[who]}"} if who else {}
        return client.request(method, f"/api/v1{path}", headers=headers, **options)

    do.client, do.tokens = client, tokens
    return do


def lines(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def exported(call, name: str, **params) -> list[dict]:
    text = call("GET", f"/campaigns/{name}/rows", params=params).text
    return [json.loads(line) for line in text.split("\n") if line]


def test_what_is_exported_comes_back_the_same_through_an_import(call):
    for name in ("one", "two"):
        assert call("POST", "/campaigns", json={"name": name}).status_code == 201
    report = call("POST", "/campaigns/one/rows", content=lines(RANKED)).json()
    assert report == {"tasks": 2, "judgments": 2, "repeated": 0}
    first = exported(call, "one")
    call("POST", "/campaigns/two/rows", content=lines(first))
    second = exported(call, "two")
    own = {"campaign"}
    assert [{k: v for k, v in row.items() if k not in own} for row in first] == [
        {k: v for k, v in row.items() if k not in own} for row in second
    ]
    assert first[0]["ranks"] == [2, 2, 3, 1] and first[1]["ranks"] == [1, 3, 1, 2]
    assert first[1]["order_shown"] == [3, 1, 0, 2] and first[1]["versions"] == ["a", "a", "b", "b"]
    repeated = call("POST", "/campaigns/one/rows", content=lines(RANKED)).json()
    assert repeated == {"tasks": 0, "judgments": 0, "repeated": 2}


def test_the_trainers_loader_takes_the_export(call, tmp_path):
    call("POST", "/campaigns", json={"name": "one"})
    pairs = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
    ]
    call("POST", "/campaigns/one/rows", content=lines(RANKED + pairs))
    file = tmp_path / "export.jsonl"
    file.write_text(call("GET", "/campaigns/one/rows").text)
    rankings = list(load_rankings(str(file)))
    assert [ranking.ranks for ranking in rankings] == [(2, 2, 3, 1), (1, 3, 1, 2), (1, 2), (1, 2)]
    assert rankings[1].ended == (True, False, True, True) and rankings[1].labeler == "bob"
    assert rankings[3].prompt == "\n\nHuman: Hi\n\nAssistant:" and rankings[3].responses == (" Hello!", " What?")


def test_exported_demonstrations_are_training_data_for_sft(call, tmp_path):
    call("POST", "/campaigns", json={"name": "w", "kind": "demonstration"})
    chat = [{"role": "user", "content": "Hi"}]
    call("POST", "/campaigns/w/rows", content=lines([{"prompt": "2+2="}, {"messages": chat}]))
    for i in range(2):
        task = call("POST", "/campaigns/w/next", "kim").json()
        body = {"key": f"key-demo-{i}", "answer": "4" if "prompt" in task["prompt"] else "Hello!"}
        assert call("POST", f"/tasks/{task['id']}/judgment", "kim", json=body).status_code == 200
    file = tmp_path / "sft.jsonl"
    file.write_text(call("GET", "/campaigns/w/rows").text)
    assert [demonstration.response for demonstration in load_demonstrations(str(file))] == ["4", "Hello!"]


def test_one_wrong_row_imports_nothing_and_is_named(call):
    call("POST", "/campaigns", json={"name": "one"})
    bad = [*RANKED, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, "x"]}]
    refused = call("POST", "/campaigns/one/rows", content=lines(bad))
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "ranks.1"
    assert exported(call, "one") == []


def test_rows_of_one_task_in_different_orders_are_one_task(call):
    call("POST", "/campaigns", json={"name": "one", "overlap": 2})
    turned = {"prompt": "Eggs?", "responses": ["raw", "boil", "boil 5 min", "fry"], "ranks": [4, 2, 1, 3]}
    report = call("POST", "/campaigns/one/rows", content=lines([RANKED[0] | {"task": "e"}, turned | {"task": "e"}]))
    assert report.json() == {"tasks": 1, "judgments": 2, "repeated": 0}
    assert [row["ranks"] for row in exported(call, "one")] == [[2, 2, 3, 1], [2, 3, 4, 1]]


def test_a_labeler_works_through_the_api(call):
    call("POST", "/campaigns", json={"name": "one"})
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c", "d"]} for i in range(2)]
    call("POST", "/campaigns/one/rows", content=lines(rows))
    task = call("POST", "/campaigns/one/next", "kim").json()
    assert set(task) == {"id", "campaign", "kind", "prompt", "answers", "lease_expires_at"}
    body = {"key": "key-api-01", "ranks": [1, 2, 3, 3], "ratings": [7, 6, None, 1]}
    receipt = call("POST", f"/tasks/{task['id']}/judgment", "kim", json=body)
    assert receipt.json() == call("POST", f"/tasks/{task['id']}/judgment", "kim", json=body).json()
    other = call("POST", f"/tasks/{task['id']}/judgment", "kim", json=body | {"ranks": [4, 3, 2, 1]})
    assert other.status_code == 409
    second = call("POST", "/campaigns/one/next", "kim").json()
    assert call("POST", f"/tasks/{second['id']}/skip", "kim", json={"reason": "unclear"}).status_code == 204
    assert call("POST", "/campaigns/one/next", "kim").json() is None
    progress = call("GET", "/campaigns/one/progress").json()
    assert (progress["judgments"], progress["wanted"], progress["skips"]) == (1, 2, 1)


def test_roles_bound_what_a_token_may_do(call):
    assert call("POST", "/campaigns", "kim", json={"name": "x"}).status_code == 403
    assert call("POST", "/campaigns", "lea", json={"name": "x"}).status_code == 201
    assert call("POST", "/labelers", "lea", json={"name": "new"}).status_code == 403
    assert call("GET", "/me", "").status_code == 401
    call.tokens["nobody"] = "made-up"
    assert call("GET", "/me", "nobody").status_code == 401


def test_a_persons_data_can_be_taken_out_and_deleted(call):
    call("POST", "/campaigns", json={"name": "one"})
    call("POST", "/campaigns/one/rows", content=lines([{"prompt": "p", "responses": ["a", "b"]}]))
    task = call("POST", "/campaigns/one/next", "kim").json()
    call("POST", f"/tasks/{task['id']}/judgment", "kim", json={"key": "key-data-1", "ranks": [1, 2], "note": "mine"})
    data = call("GET", "/labelers/kim/data").json()
    assert data["submissions"][0]["content"] == {"ranks": [1, 2], "note": "mine"}
    assert call("DELETE", "/labelers/kim").json() == {"judgments": 1}
    assert exported(call, "one") == [] and call("GET", "/labelers/kim/data").status_code == 404


def test_win_rates_count_ties_half_and_equal_answers_as_ties(call):
    call("POST", "/campaigns", json={"name": "v", "kind": "comparison"})
    rows = [{"prompt": f"p{i}", "responses": [f"old {i}", f"new {i}"], "versions": ["old", "new"]} for i in range(4)]
    rows[3]["responses"] = ["same", "same"]
    ranks = [[2, 1], [2, 1], [1, 1]]
    judged = [row | {"ranks": rank, "labeler": "ann"} for row, rank in zip(rows, ranks, strict=False)]
    call("POST", "/campaigns/v/rows", content=lines([*judged, rows[3]]))
    rate = call("GET", "/campaigns/v/win-rates").json()[0]
    assert (rate["base"], rate["challenger"]) == ("new", "old")
    assert rate["rate"] == pytest.approx(0.25) and rate["low"] < 0.25 < rate["high"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["identical"]) == (0, 1, 2, 1)


def test_a_session_ends_when_it_is_not_used(call, clock):
    client = call.client
    page = client.get("/sign-in").text
    csrf = page.split('name="csrf" value="')[1].split('"')[0]
    client.post("/sign-in", data={"csrf": csrf, "name": "kim", "token": call.tokens["kim"]})
    for hours in (11, 22):
        clock.now = datetime(2026, 11, 23, 9, 0, tzinfo=UTC) + timedelta(hours=hours)
        assert client.get("/").status_code == 200
    clock.now += timedelta(hours=13)
    assert client.get("/").status_code == 303


def test_the_openapi_description_covers_every_path(call):
    spec = call("GET", "/openapi.json").json()
    assert spec["openapi"].startswith("3.") and len(spec["paths"]) >= 18
    for path, methods in spec["paths"].items():
        for method, about in methods.items():
            assert about["description"], (method, path)


def test_unknown_fields_are_refused_by_name(call):
    refused = call("POST", "/campaigns", json={"name": "x", "overlpa": 2})
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "overlpa"

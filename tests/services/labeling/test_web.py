"""The pages over HTTP, without a browser: sign-in, forms, blindness, roles, headers, languages."""

import html
import re

import pytest
from fastapi.testclient import TestClient

from tests.services.labeling.sample_room import SampleRoom, fill
from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.database import Database
from trimtab.labeling.exporting import export_rows
from trimtab.labeling.translations import LANGUAGES, choose_language, words
from trimtab.labeling.web.app import create_app
from trimtab.labeling.web.room import Room

ORIGIN = "http://testserver"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(app, database, sample room) of a SQLite database that the tests of this module share."""
    database = Database(str(tmp_path_factory.mktemp("web") / "labels.sqlite"))
    database.migrate()
    room = fill(database)
    yield create_app(Room(database, LabelingConfig())), database, room
    database.close()


@pytest.fixture
def visit(served):
    """visit(name): a client signed in as that person; "" is nobody."""
    app, _, room = served

    def enter(name: str = "", **headers: str) -> TestClient:
        client = TestClient(app, headers=headers, follow_redirects=False)
        if name:
            assert sign_in(client, room, name).status_code == 303
        return client

    return enter


def sign_in(client: TestClient, room: SampleRoom, name: str, token: str | None = None):
    page = client.get("/sign-in").text
    form = {"csrf": field(page, "csrf"), "name": name, "token": token or room.tokens[name], "next": "/"}
    return client.post("/sign-in", data=form)


def field(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, name
    return html.unescape(found.group(1))


def rank_form(page: str, ranks: str = "1234") -> dict:
    letters = sorted(set(re.findall(r'name="rank_(\w)"', page)))
    given = {f"rank_{letter}": rank for letter, rank in zip(letters, ranks + "9" * 9, strict=False)}
    return {"csrf": field(page, "csrf"), "key": field(page, "key"), "seconds": "12.5"} | given


def open_task(client: TestClient, campaign: str) -> tuple[str, str]:
    page = client.get(f"/c/{campaign}/next").text
    found = re.search(r'action="(/t/\d+)"', page)
    assert found
    return page, found.group(1)


def test_nobody_gets_in_without_the_right_token(visit, served):
    client = visit()
    assert client.get("/").headers["location"].startswith("/sign-in")
    assert client.get("/lead").headers["location"].startswith("/sign-in")
    refused = sign_in(client, served[2], "ann", token="not-the-token")
    assert "failed" in refused.headers["location"]
    assert sign_in(client, served[2], "bob", token=served[2].tokens["ann"]).headers["location"] != "/"
    assert client.get("/").status_code == 303


def test_signing_in_never_leads_to_another_site(visit, served):
    client = visit()
    for target in ("//evil.example", "https://evil.example", "/\\evil.example"):
        page = client.get("/sign-in").text
        form = {"csrf": field(page, "csrf"), "name": "ann", "token": served[2].tokens["ann"], "next": target}
        assert client.post("/sign-in", data=form).headers["location"] == "/"
        client.cookies.clear()


def test_the_cookie_is_hidden_from_scripts_and_other_sites(visit, served):
    answer = sign_in(visit(), served[2], "ann")
    cookie = next(c for c in answer.headers.get_list("set-cookie") if c.startswith("trimtab_session"))
    assert "httponly" in cookie.lower() and "samesite=lax" in cookie.lower()


def test_every_page_forbids_foreign_scripts_frames_and_caches(visit):
    headers = visit("ann").get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_no_page_holds_inline_scripts_or_styles(visit):
    paths = {"ann": ["/", "/c/helpful", "/c/helpful/next", "/c/helpful/mine"], "lea": ["/lead", "/lead/c/helpful"]}
    for name, own in paths.items():
        client = visit(name)
        for path in own:
            page = client.get(path).text
            assert not re.search(r"<script(?![^>]*(src=|application/json))", page), path
            assert " style=" not in page and "onclick=" not in page, path


def test_a_form_without_the_sessions_token_is_refused(visit, served):
    client = visit("ann")
    page, action = open_task(client, "helpful")
    form = rank_form(page, "121212")
    for wrong in ("", "x" * 43, "é"):
        assert client.post(action, data=form | {"csrf": wrong}).status_code == 403
    other = visit("bob")
    assert other.post(action, data=form).status_code == 403


def test_the_api_takes_no_cookie_without_the_header(visit):
    client = visit("ann")
    body = {"reason": "unclear"}
    assert client.post("/api/v1/campaigns/helpful/next").status_code == 403
    assert client.post("/api/v1/campaigns/helpful/next", data=body).status_code == 403
    token = re.search(r'name="csrf" content="([^"]+)"', client.get("/").text).group(1)
    assert client.post("/api/v1/campaigns/helpful/next", headers={"x-csrf-token": token}).status_code == 200


def test_a_ranking_is_saved_by_a_plain_form_without_scripts(visit, served):
    client = visit("bob")
    page, action = open_task(client, "helpful")
    saved = client.post(action, data=rank_form(page, "121345") | {"rating_A": "6", "flags_B": ["sexual", "violent"]})
    assert (saved.status_code, saved.headers["location"]) == (303, "/c/helpful/next")
    row = next(row for row in export_rows(served[1], "helpful") if row["labeler"] == "bob" and row["task"] == "words")
    shown = [row["ranks"][position] for position in row["order_shown"]]
    assert shown == [1, 2, 1, 3, 4, 5] and row["seconds"] == 12.5
    assert row["ratings"][row["order_shown"][0]] == 6
    assert row["flags"][row["order_shown"][1]] == ["sexual", "violent"]
    again = client.get(action).text
    assert re.search(r'name="rank_C" value="1" checked', again)
    edited = client.post(action, data=rank_form(again, "111111"), headers={"accept": "application/json"})
    assert edited.json() == {"next": "/c/helpful/mine", "revision": 2}


def test_an_incomplete_ranking_says_what_is_missing(visit):
    client = visit("ann")
    page, action = open_task(client, "helpful")
    form = rank_form(page)
    del form["rank_A"]
    refused = client.post(action, data=form, headers={"accept": "application/json"})
    assert refused.status_code == 422 and "ranks[0]" in refused.json()["error"]["message"]


def test_labelers_never_learn_which_version_wrote_what(visit):
    client = visit("ann")
    for campaign in ("helpful", "new-or-old"):
        page, _ = open_task(client, campaign)
        assert "policy@" not in page and "run-1" not in page
    assert client.get("/lead/c/helpful").status_code == 403
    task = client.post(
        "/api/v1/campaigns/new-or-old/next", headers={"x-csrf-token": field_of_head(client.get("/").text)}
    )
    assert "policy@" not in task.text and "version" not in task.text
    assert client.get("/api/v1/campaigns/helpful/rows").status_code == 403


def field_of_head(page: str) -> str:
    return re.search(r'name="csrf" content="([^"]+)"', page).group(1)


def test_responses_are_shown_as_markdown_and_run_nothing(visit):
    client = visit("ann")
    page, _ = open_task(client, "helpful")
    assert '<span class="k">def</span>' in page and "<table>" in page
    assert (
        "<script>document" not in page
        and "<img" not in page
        and "javascript:" not in page.replace(html.escape("(javascript:alert(1))"), "")
    )


def test_a_comparison_is_one_choice(visit, served):
    client = visit("bob")
    page, action = open_task(client, "new-or-old")
    form = {"csrf": field(page, "csrf"), "key": field(page, "key"), "preference": "b"}
    assert client.post(action, data=form).status_code == 303
    row = next(export_rows(served[1], "new-or-old"))
    assert [row["ranks"][position] for position in row["order_shown"]] == [2, 1]


def test_a_demonstration_is_exported_as_training_data(visit, served):
    client = visit("ann")
    page, action = open_task(client, "write")
    form = {"csrf": field(page, "csrf"), "key": field(page, "key"), "answer": "Light scatters.\r\nBlue most of all."}
    assert client.post(action, data=form).status_code == 303
    row = next(export_rows(served[1], "write"))
    assert row["completion"] == "Light scatters.\nBlue most of all." and row["prompt"].startswith("Explain")


def test_a_lead_makes_a_campaign_in_the_page(visit, served):
    client = visit("lea")
    page = client.get("/lead/new").text
    form = {"csrf": field(page, "csrf"), "name": "by-page", "title": "By page", "kind": "ranking", "overlap": "2"}
    lines = '{"prompt": "p", "responses": ["a", "b", "c"]}\n{"prompt": "q", "responses": ["d", "e"]}'
    assert client.post("/lead/new", data=form | {"lines": lines}).headers["location"] == "/lead/c/by-page"
    assert "0 / 4" in client.get("/lead/c/by-page").text
    wrong = client.post("/lead/new", data=form | {"name": "By Page"})
    assert wrong.status_code == 422 and "By page" in wrong.text
    refused = client.post("/lead/c/by-page/import", data=form, files={"file": ("x.jsonl", b'{"prompt": 3}\n')})
    assert "wrong=" in refused.headers["location"]


def test_a_lead_sees_agreement_and_decides_a_disagreement(visit, served):
    client = visit("lea")
    page = client.get("/lead/c/helpful").text
    assert "Krippendorff" in page and "cy" in page
    path = re.search(r'href="(/lead/c/helpful/t/\d+)"', page).group(1)
    task = client.get(path).text
    assert "run-1/policy@40" in task
    opened = client.post(f"{path}/adjudicate", data={"csrf": field(task, "csrf")}).headers["location"]
    decided = client.post(opened.partition("?")[0], data=rank_form(client.get(opened).text) | {"adjudicate": "1"})
    assert decided.headers["location"] == path
    assert any(row["adjudication"] for row in export_rows(served[1], "helpful"))


def test_an_admin_adds_a_person_whose_token_works_until_renewed(visit, served):
    client = visit("root")
    csrf = field(client.get("/people").text, "csrf")
    page = client.post("/people", data={"csrf": csrf, "name": "zoe", "role": "labeler"}).text
    token = re.search(r'<code id="token">([^<]+)</code>', page).group(1)
    assert sign_in(visit(), served[2], "zoe", token).headers["location"] == "/"
    client.post("/people/zoe/token", data={"csrf": csrf})
    assert "failed" in sign_in(visit(), served[2], "zoe", token).headers["location"]
    assert client.post("/people/zoe/delete", data={"csrf": csrf, "confirm": "no"}).status_code == 422
    assert client.post("/people/zoe/delete", data={"csrf": csrf, "confirm": "zoe"}).status_code == 303
    assert "zoe" not in client.get("/people").text
    assert visit("lea").get("/people").status_code == 403


def test_signing_out_ends_the_session_on_the_server(visit):
    client = visit("ann")
    cookie = dict(client.cookies)
    client.post("/sign-out", data={"csrf": field(client.get("/").text, "csrf")})
    client.cookies.update(cookie)
    assert client.get("/").status_code == 303


def test_the_language_is_the_browsers_until_one_is_chosen(visit):
    client = visit("ann", **{"accept-language": "zh-CN,zh;q=0.9,en;q=0.8"})
    assert 'lang="zh-CN"' in client.get("/").text and "你好" in client.get("/").text
    client.get("/choose?language=en&theme=dark&back=/")
    page = client.get("/").text
    assert 'lang="en"' in page and 'data-theme="dark"' in page
    assert client.get("/choose?back=//evil.example").headers["location"] == "/"


def test_both_languages_have_the_same_words_with_the_same_places():
    place = re.compile(r"\{(\w+)\}")
    first, *others = (words(language) for language in LANGUAGES)
    for other in others:
        assert other.keys() == first.keys()
        for key in first:
            assert sorted(place.findall(other[key])) == sorted(place.findall(first[key])), key


@pytest.mark.parametrize(
    ("header", "language"),
    [("", "en"), ("fr,zh;q=0.5", "zh"), ("en;q=0.1,zh-TW;q=0.2", "zh"), ("zh;q=0", "en"), ("xx;q=abc", "en")],
)
def test_the_browsers_wishes_are_weighed(header, language):
    assert choose_language(None, header) == language

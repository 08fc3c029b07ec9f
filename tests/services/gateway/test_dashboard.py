"""The dashboard over a real run: who may see what, live events, samples beside SFT, roll back; in Chromium too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.services.gateway.dashboard_room import PROMPTS, RUN, Room, http, open_room
from tests.services.labeling.browser import chromium_path, open_browser
from tests.services.labeling.test_browser import AXE_RULES
from trimtab.weights.store import open_store
from trimtab_client import TrainerClient

STEPS = 3
HTML = {"accept": "text/html"}
SEEN = ("", "/events", "/samples", "/people", "/versions")
PATHS = ("", "/samples", "/samples?every=1", "/people", "/versions", "/sign-in")
needs_browser = pytest.mark.skipif(
    chromium_path() is None, reason="no Chromium: apt-get install chromium, or CHROMIUM=…"
)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Iterator[Room]:
    with open_room(tmp_path_factory.mktemp("dashboard"), STEPS) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def events(text: str) -> list[tuple[str, dict]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]


def test_who_is_not_signed_in_is_sent_to_the_form_and_other_roles_are_refused(room: Room) -> None:
    with http(room) as stranger, http(room, "scorer") as scorer, http(room, "watcher") as watcher:
        turned = stranger.get("/dashboard/samples", headers=HTML)
        assert (turned.status_code, turned.headers["location"]) == (303, "/dashboard/sign-in")
        assert stranger.get("/dashboard/events").status_code == 401
        assert stranger.get("/dashboard/sign-in", headers=HTML).status_code == 200
        assert {scorer.get(f"/dashboard{path}").status_code for path in SEEN} == {403}
        assert watcher.get("/dashboard").status_code == 200
        refused = stranger.post("/dashboard/session", json={"token": "tt_no_such"})
        assert refused.status_code == 401 and "set-cookie" not in refused.headers


def test_signing_in_gives_a_cookie_that_scripts_and_other_sites_cannot_use(room: Room) -> None:
    with http(room) as client:
        signed_in = client.post("/dashboard/session", json={"token": room.tokens["watcher"]})
        cookie = signed_in.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "path=/dashboard" in cookie
        assert client.get("/dashboard", headers=HTML).status_code == 200
        assert client.get("/v1/models").status_code == 401  # the cookie opens nothing but the dashboard
        client.delete("/dashboard/session")
        assert client.get("/dashboard", headers=HTML).status_code == 303


def test_events_bring_each_step_once_and_go_on_where_the_browser_left_off(room: Room) -> None:
    with http(room, "watcher") as client:
        whole = events(client.get("/dashboard/events").text)
        rest = events(client.get("/dashboard/events?after=2").text)
        missing = events(client.get("/dashboard/events?run_id=none").text)
    assert [data["step"] for name, data in whole if name == "step"] == [1, 2, 3]
    assert all(data["values"]["kl_nats_per_sequence"] is not None for name, data in whole if name == "step")
    assert [data["state"] for name, data in whole if name == "status"][-1] == "succeeded"
    assert [data["step"] for name, data in rest if name == "step"] == [3]
    assert [name for name, _ in missing] == ["trouble"] and "no run none" in missing[0][1]["message"]


def test_a_sample_has_the_sft_answer_beside_it_and_numbers_of_every_token(room: Room) -> None:
    with TrainerClient(room.trainer) as client:
        watched, newest, second = client.samples(watched=True), client.samples(), client.samples(step=2)
    assert {sample.prompt for sample in watched} == set(PROMPTS)
    assert {sample.step for sample in newest} == {3} and {sample.step for sample in second} == {2}
    for sample in watched:
        assert sample.step == 3 and sample.first is not None and sample.first.prompt == sample.prompt
        assert sample.first.step == 1 and max(map(abs, sample.first.kl_nats)) < 1e-3  # SFT is the reference itself
        assert max(map(abs, sample.kl_nats)) > 1e-3
        assert len(sample.tokens) == len(sample.kl_nats) == len(sample.values) == 40
        assert "".join(sample.tokens).strip() == sample.text.strip()
    with http(room, "watcher") as client:
        page = client.get("/dashboard/samples").text
    assert page.count('data-answer="sft"') == page.count('data-answer="current"') == len(PROMPTS)
    assert 'data-kl="' in page and 'data-value="' in page


def test_the_win_rate_that_people_gave_is_shown_with_its_interval(room: Room) -> None:
    with http(room, "watcher") as client:
        page = client.get("/dashboard/people").text
    for text in ("PPO or SFT?", "kind-stories/policy@3", "kind-stories/policy@1", "70.0 %", "7 / 0 / 3"):
        assert text in page, text
    low, high = map(float, re.findall(r"aria-label=\"([\d.]+) % to ([\d.]+) %", page)[0])
    assert 0 < low < 70 < high <= 100


def test_an_admin_alone_moves_the_pointer(room: Room) -> None:
    store, back = open_store(str(room.store)), {"run_id": RUN, "name": "policy", "step": 2}

    def current() -> int:
        version = store.current_version(RUN, "policy")
        assert version is not None
        return version.step

    with http(room, "watcher") as watcher, http(room, "root") as root:
        assert "Roll back" not in watcher.get("/dashboard/versions").text
        assert watcher.post("/dashboard/roll-back", json=back).status_code == 403 and current() == 3
        assert "Roll back" in root.get("/dashboard/versions").text
        assert root.post("/dashboard/roll-back", json=back | {"step": 99}).status_code == 404
        assert root.post("/dashboard/roll-back", json=back | {"run_id": "../x"}).status_code == 400
        assert root.post("/dashboard/roll-back", content=json.dumps(back)).status_code == 415 and current() == 3
        assert root.post("/dashboard/roll-back", json=back).status_code == 200 and current() == 2
        assert "Make current" in root.get("/dashboard/versions").text
        assert root.post("/dashboard/roll-back", json=back | {"step": 3}).status_code == 200 and current() == 3


def opened(browser: Browser, room: Room, person: str | None, **look: object) -> Page:
    context = browser.new_context(reduced_motion="reduce", **look)
    if person:
        context.add_cookies(room.cookies(person))
    return context.new_page()


@needs_browser
def test_the_charts_draw_themselves_without_any_other_host(browser: Browser, room: Room) -> None:
    page = opened(browser, room, None)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"{room.url}/dashboard")
    page.get_by_label("Token").fill(room.tokens["watcher"])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name=RUN)).to_be_visible()
    for title in ("Reward", "KL against", "Loss", "Clip fraction", "Explained variance", "Throughput", "Waiting"):
        chart = page.locator(".chart", has=page.get_by_role("heading", name=title))
        expect(chart.locator("canvas")).to_be_visible()
    expect(page.get_by_text("step 3 of 3")).to_be_visible()
    assert page.locator(".chart").first.get_by_role("img").get_attribute("aria-label", timeout=5000)
    assert not faults and all(url.startswith(room.url) for url in asked)


@needs_browser
def test_an_admin_rolls_back_with_a_click_and_a_second_one(browser: Browser, room: Room) -> None:
    page = opened(browser, room, "root")
    page.goto(f"{room.url}/dashboard/versions")
    for step in (2, 3):
        row = page.get_by_role("row").filter(has=page.get_by_role("cell", name=str(step), exact=True))
        row.get_by_role("button").click()
        page.get_by_role("button", name="Move the pointer").click()
        expect(page.locator("tr.current td").first).to_contain_text(f"{step} current")
        page.wait_for_load_state()  # the page was loaded anew: its buttons do nothing before its script has run


@needs_browser
def test_the_policy_that_is_served_now_answers_a_prompt(browser: Browser, room: Room) -> None:
    page = opened(browser, room, "root")
    page.goto(f"{room.url}/dashboard/samples?every=1&step=1")
    live = page.locator(".live").first
    live.get_by_role("button").click()
    expect(live.get_by_text(f"served now: {RUN}/policy@3")).to_be_visible(timeout=20_000)


@needs_browser
@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_every_page_is_accessible_and_fits_a_phone(browser: Browser, room: Room, theme: str) -> None:
    page = opened(browser, room, "root", color_scheme=theme, viewport={"width": 390, "height": 844})
    for path in PATHS:
        page.goto(f"{room.url}/dashboard{path}")
        if not path:
            page.wait_for_selector("canvas")
        violations = Axe().run(page, options=AXE_RULES).response["violations"]
        assert not [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in violations], path
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path

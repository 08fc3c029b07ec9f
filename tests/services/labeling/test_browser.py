"""The pages in a real Chromium: keys alone, drag and drop, drafts, a server that goes away, accessibility.

Skipped with a reason where there is no Chromium; the same promises hold over HTTP in test_web.py, and the ranking's own
logic under Node in test_ranking_script.py.
"""

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.services.labeling.browser import chromium_path, open_browser, start_server
from tests.services.labeling.sample_room import make
from trimtab.labeling.database import Database
from trimtab.labeling.exporting import export_rows
from trimtab.labeling.labelers import add_labeler, delete_labeler
from trimtab.labeling.vocabulary import Role

pytestmark = pytest.mark.skipif(chromium_path() is None, reason="no Chromium: apt-get install chromium, or CHROMIUM=…")
LETTERS = "ABCDEF"
AXE_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


class Served:
    """The sample room behind a real server process that tests may kill and start again on its port."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.room = make(path)
        self.process, self.address = start_server(str(path))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        port = int(self.address.rpartition(":")[2])
        self.process, _ = start_server(str(self.path), port=port)

    def rows(self, campaign: str = "helpful") -> list[dict]:
        database = Database(str(self.path))
        rows = [row for row in export_rows(database, campaign) if row["labeler"] == "bob" and row["task"] == "words"]
        database.close()
        return rows

    def renew_bob(self) -> None:
        """Bob begins anew: all that he did is gone."""
        database = Database(str(self.path))
        with database.write() as session:
            delete_labeler(session, "bob")
            _, self.room.tokens["bob"] = add_labeler(session, "bob", Role.LABELER, datetime.now(UTC))
        database.close()


@pytest.fixture(scope="module")
def process(tmp_path_factory) -> Iterator[Served]:
    opened = Served(tmp_path_factory.mktemp("browser") / "labels.sqlite")
    yield opened
    opened.process.kill()
    opened.process.wait()


@pytest.fixture
def served(process) -> Served:
    process.renew_bob()
    return process


@pytest.fixture
def enter(served, browser) -> Iterator:
    """enter(name, path, **context): a page of that person, signed in by the link that operators send."""
    contexts = []

    def go(name: str, path: str, **options) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1300, "height": 900}, "locale": "en-GB"} | options))
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{served.address}/sign-in#name={name}&token={served.room.tokens[name]}")
        expect(page.locator("h1")).to_contain_text(name)
        assert "token" not in page.url
        page.goto(served.address + path)
        return page

    yield go
    for context in contexts:
        context.close()


def board(page: Page) -> list[str]:
    """The letters on each rank, as the board shows them."""
    script = "lanes => lanes.map(lane => [...lane.querySelectorAll('.chip')].map(c => c.dataset.letter).join(''))"
    return page.locator(".slot").evaluate_all(script)


def shown_ranks(row: dict) -> list[int]:
    return [row["ranks"][position] for position in row["order_shown"]]


def test_a_ranking_by_keys_alone(served, enter):
    page = enter("bob", "/c/helpful/next")
    for digit in "214233":  # each digit ranks an answer and goes on to the next
        page.keyboard.press(digit)
    assert board(page) == ["B", "AD", "EF", "C", "", ""]
    page.keyboard.press("ArrowUp")  # from F to E
    page.keyboard.press("ArrowLeft")  # E leaves its tie for a rank of its own above it
    assert board(page) == ["B", "AD", "E", "F", "C", ""]
    page.keyboard.press("t")
    assert board(page)[1] == "ADE"
    page.keyboard.press("u")
    assert board(page) == ["B", "AD", "E", "F", "C", ""]
    page.keyboard.press("Shift+Digit6")
    assert page.locator("[name=rating_E]:checked").input_value() == "6"
    page.keyboard.press("f")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    page.wait_for_url("**/c/helpful/next")
    expect(page.locator(".pace strong")).to_have_text("1")
    [row] = served.rows()
    assert shown_ranks(row) == [2, 1, 5, 2, 3, 4]
    assert row["ratings"][row["order_shown"][4]] == 6
    assert row["flags"][row["order_shown"][4]] == ["fails_instruction"]
    assert 0 < row["seconds"] < 120


def test_a_ranking_by_dragging_onto_ranks_and_between_them(served, enter):
    page = enter("bob", "/c/helpful/next")
    drag(page, ".tray .chip[data-letter=A]", "[data-slot='1']")
    drag(page, ".tray .chip[data-letter=B]", "[data-slot='2']")
    drag(page, ".tray .chip[data-letter=C]", "[data-gap='2']")  # between A and B
    drag(page, "#answer-D [data-drag]", "[data-slot='1']")  # the letter of the answer itself: tied with A
    assert board(page)[:3] == ["AD", "C", "B"]
    drag(page, ".slot .chip[data-letter=C]", "[data-slot='0']") if page.locator(".tray").is_visible() else None
    assert page.locator("[name=rank_D]:checked").input_value() == "1"


def drag(page: Page, what: str, onto: str) -> None:
    source = page.locator(what)
    source.scroll_into_view_if_needed()
    start = source.bounding_box()
    assert start
    page.mouse.move(start["x"] + 12, start["y"] + 12)
    page.mouse.down()
    page.mouse.move(start["x"] + 24, start["y"] + 24)
    target = page.locator(onto).bounding_box()
    assert target
    page.mouse.move(target["x"] + target["width"] / 2, target["y"] + target["height"] / 2, steps=4)
    page.mouse.up()


def test_unfinished_work_survives_a_closed_page(enter):
    page = enter("bob", "/c/helpful/next")
    for digit in "2143":
        page.keyboard.press(digit)
    page.locator("[name=note]").fill("half done")
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("#status")).to_contain_text("restored")
    assert board(page)[:4] == ["B", "A", "D", "C"]
    assert page.locator("[name=note]").input_value() == "half done"


def test_a_ranking_sent_while_the_server_is_dead_arrives_once_when_it_is_back(served, enter):
    page = enter("bob", "/c/helpful/next")
    for digit in "123456":
        page.keyboard.press(digit)
    served.kill()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Not saved yet")
    served.restart()
    page.wait_for_url("**/c/helpful/next", timeout=30_000)
    expect(page.locator(".pace strong")).to_have_text("1", timeout=30_000)
    [row] = served.rows()
    assert shown_ranks(row) == [1, 2, 3, 4, 5, 6] and row["revision"] == 1


def test_what_a_response_says_never_runs(served, enter):
    page = enter("bob", "/c/helpful/next")
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.reload()
    assert "owned" not in page.title() and page.title() != "1"
    assert page.locator(".answer img").count() == 0 and page.locator(".answer a[href^=javascript]").count() == 0
    assert page.locator(".answer .code .k").count() > 0
    assert errors == []


def test_an_incomplete_ranking_is_not_sent_and_the_missing_answer_is_chosen(served, enter):
    page = enter("bob", "/c/helpful/next")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("5 to rank")
    expect(page.locator("#answer-B")).to_be_focused()
    assert served.rows() == []


def test_long_answers_fold_and_show_as_written(enter):
    page = enter("bob", "/c/helpful/next")
    folded = page.locator(".answer-text.folded")
    expect(folded).to_have_count(1)
    folded.locator("xpath=..").get_by_role("button", name="Show all").click()
    expect(page.locator(".answer-text.folded")).to_have_count(0)
    page.keyboard.press("m")
    assert page.locator(".answer .raw:visible").count() == 1


def test_skipping_asks_why(served, enter):
    page = enter("bob", "/c/helpful/next")
    first = page.locator("#task").get_attribute("action")
    page.keyboard.press("s")
    page.get_by_label("The prompt is unclear").check()
    page.get_by_role("dialog").get_by_role("button", name="Skip").click()
    expect(page.locator("#task")).not_to_have_attribute("action", str(first))


def test_an_own_past_ranking_is_opened_changed_and_saved(served, enter):
    page = enter("bob", "/c/helpful/next")
    for digit in "123456":
        page.keyboard.press(digit)
    page.keyboard.press("Enter")
    expect(page.locator(".pace strong")).to_have_text("1")
    page.goto(served.address + "/c/helpful/mine")
    page.locator(".rows a").first.click()
    assert board(page) == list(LETTERS)
    page.keyboard.press("t")  # A with the next one
    page.keyboard.press("Enter")
    page.wait_for_url("**/mine")
    [row] = served.rows()
    assert shown_ranks(row) == [1, 1, 2, 3, 4, 5] and row["revision"] == 2


def test_a_task_stays_in_its_labelers_hands_when_the_server_is_killed(served, enter):
    page = enter("bob", "/c/write/next")
    held = page.locator("#task").get_attribute("action")
    served.kill()
    served.restart()
    page.goto(served.address + "/c/write/next")
    assert page.locator("#task").get_attribute("action") == held


@pytest.mark.parametrize(
    "path", ["/", "/c/helpful", "/c/helpful/next", "/c/new-or-old/next", "/c/write/next", "/t/999"]
)
def test_a_page_in_chinese_holds_no_english_words_of_its_own(enter, path):
    page = enter("bob", path, locale="zh-CN")
    script = """() => {
      const foreign = ".prompt, .answer-text, .chip, .where, .brand, .card h2, .menu-name, [lang=en], kbd, .choice, h1";
      const words = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      for (let node; (node = walker.nextNode()); ) {
        const own = !node.parentElement.closest(foreign + ", script, noscript");
        if (own) words.push(...(node.textContent.match(/[A-Za-z]{2,}/g) ?? []));
      }
      return words;
    }"""
    assert set(page.evaluate(script)) <= {"Enter", "Shift", "bob"}


def test_a_comparison_takes_two_keys(served, enter):
    page = enter("bob", "/c/new-or-old/next")
    first = page.locator("#task").get_attribute("action")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    expect(page.locator("#task")).not_to_have_attribute("action", str(first))
    database = Database(str(served.path))
    [row] = export_rows(database, "new-or-old")
    database.close()
    assert shown_ranks(row) == [2, 1]


ALL_PAGES = {
    "bob": [
        *("/", "/c/helpful", "/c/helpful/next", "/c/new-or-old/next", "/c/write/next", "/c/helpful/mine", "/t/999"),
        *("/about-keys", "/c/done/next", "/c/helpful/next ?", "/c/helpful/next s"),
    ],
    "lea": ["/lead", "/lead/new", "/lead/c/helpful", "/lead/c/new-or-old", "/lead/c/helpful/t/4"],
    "root": ["/people"],
}
CHIEF_PAGES = {"bob": ["/c/helpful/next", "/c/new-or-old/next"], "lea": ["/lead/c/helpful"]}
DESKTOP, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}


@pytest.mark.parametrize(
    ("theme", "size", "paths"),
    [
        pytest.param("light", DESKTOP, CHIEF_PAGES, id="light"),
        pytest.param("dark", PHONE, CHIEF_PAGES, id="dark"),
        pytest.param("light", PHONE, ALL_PAGES, id="all-light", marks=pytest.mark.slow),
        pytest.param("dark", DESKTOP, ALL_PAGES, id="all-dark", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(served, enter, theme, size, paths):
    found = []
    for name, own in paths.items():
        page = enter(name, "/", viewport=size, color_scheme=theme)
        for path in own:
            path, _, keys = path.partition(" ")
            page.goto(served.address + path)
            if path == "/c/helpful/next":
                for key in keys or "12f":
                    page.keyboard.press(key)
            found += violations(page, f"{path} {keys}")
    page.context.clear_cookies()
    page.goto(served.address + "/sign-in?failed=1")
    assert found + violations(page, "/sign-in") == []


def violations(page: Page, path: str) -> list[tuple]:
    results = Axe().run(page, options=AXE_RULES).response
    return [(path, one["id"], one["nodes"][0]["html"][:200]) for one in results["violations"]]


def test_nothing_sticks_out_of_a_phones_screen(served, enter):
    for name, paths in ALL_PAGES.items():
        page = enter(name, "/", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        for path in paths:
            page.goto(served.address + path.partition(" ")[0])
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path

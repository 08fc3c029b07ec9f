"""Pictures of each screen: python -m tests.services.labeling.screens FOLDER [WHICH …]; needs Chromium.

Desktop and phone, light and dark, English and Chinese. WHICH are screens or looks (task, dark, zh, phone); all without.
Look at them after a change to templates or styles.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.services.labeling.browser import open_browser, run_server
from tests.services.labeling.sample_room import make

SIZES = {"desktop": {"width": 1360, "height": 860}, "phone": {"width": 390, "height": 844}}


def rank_some(page: Page) -> None:
    page.keyboard.press("2")
    page.keyboard.press("1")
    page.keyboard.press("4")
    page.keyboard.press("2")
    page.wait_for_timeout(350)


def open_marks(page: Page) -> None:
    rank_some(page)
    page.keyboard.press("f")
    page.locator(".answer.chosen [name^=flags_]").nth(2).check()


SCREENS = {
    "sign-in": ("", "/sign-in", None),
    "sign-in-failed": ("", "/sign-in?failed=1", None),
    "home": ("ann", "/", None),
    "campaign": ("ann", "/c/helpful", None),
    "task": ("ann", "/c/helpful/next", None),
    "task-ranking": ("ann", "/c/helpful/next", rank_some),
    "task-flags": ("ann", "/c/helpful/next", open_marks),
    "task-keys": ("ann", "/c/helpful/next", lambda page: page.keyboard.press("?")),
    "task-skip": ("ann", "/c/helpful/next", lambda page: page.keyboard.press("s")),
    "compare": ("ann", "/c/new-or-old/next", None),
    "write": ("ann", "/c/write/next", None),
    "past": ("ann", "/c/helpful/mine", None),
    "edit": ("ann", "/t/4", None),
    "keys": ("ann", "/about-keys", None),
    "nothing-left": ("ann", "/c/done/next", None),
    "menu": ("lea", "/", lambda page: page.locator("details.menu summary").click()),
    "lead": ("lea", "/lead", None),
    "lead-campaign": ("lea", "/lead/c/helpful", None),
    "lead-comparison": ("lea", "/lead/c/new-or-old", None),
    "lead-task": ("lea", "/lead/c/helpful/t/4", None),
    "lead-new": ("lea", "/lead/new", None),
    "people": ("root", "/people", None),
    "people-open": ("root", "/people", lambda page: page.locator(".row-menu summary").first.click()),
    "error": ("ann", "/t/99999", None),
}
IN_VIEW = ("task-ranking", "task-flags", "task-keys", "task-skip", "menu")  # the others are shown whole, however long


def main(folder: Path, which: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    looks = [(language, theme, size) for language in ("en", "zh") for theme in ("light", "dark") for size in SIZES]
    names = [name for name in SCREENS if not which & set(SCREENS) or name in which]
    parts = {part for look in looks for part in look}
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / "labels.sqlite"
        room = make(database)
        with run_server(str(database)) as address, open_browser() as browser:
            for look in looks:
                if which & parts <= set(look):
                    shoot(browser, address, room.tokens, folder, names, look)


def shoot(
    browser: Browser, address: str, tokens: dict[str, str], folder: Path, names: list[str], look: tuple[str, str, str]
) -> None:
    language, theme, size = look
    pages: dict[str, Page] = {}
    for name in names:
        person, path, act = SCREENS[name]
        if person not in pages:
            context = browser.new_context(
                viewport=SIZES[size],
                locale={"en": "en-GB", "zh": "zh-CN"}[language],
                color_scheme=theme,
                has_touch=size == "phone",
                is_mobile=size == "phone",
                reduced_motion="reduce",
            )
            context.add_init_script("localStorage.clear()")  # no draft of an earlier picture
            pages[person] = context.new_page()
            if person:
                pages[person].goto(f"{address}/sign-in#name={person}&token={tokens[person]}")
                pages[person].wait_for_selector("h1")
        page = pages[person]
        page.goto(address + path)
        if act:
            act(page)
        page.screenshot(path=folder / f"{name}-{size}-{theme}-{language}.png", full_page=name not in IN_VIEW)
    for page in pages.values():
        page.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))

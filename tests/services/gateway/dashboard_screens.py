"""Pictures of the dashboard: python -m tests.services.gateway.dashboard_screens FOLDER [STEPS]; needs Chromium.

Desktop and phone, light and dark. Look at them after a change to templates, styles or the script.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.services.gateway.dashboard_room import Room, open_room
from tests.services.labeling.browser import open_browser

SIZES = {"desktop": {"width": 1360, "height": 860}, "phone": {"width": 390, "height": 844}}


def by_value(page: Page) -> None:
    page.get_by_label("value").check()


def drawn(page: Page) -> None:
    page.wait_for_selector("canvas")
    page.wait_for_timeout(500)


SCREENS = {
    "charts": ("watcher", "", drawn),
    "samples": ("root", "/samples", None),
    "samples-value": ("root", "/samples?every=1", by_value),
    "people": ("watcher", "/people", None),
    "versions": ("root", "/versions", None),
    "versions-sure": ("root", "/versions", lambda page: page.locator(".roll-back").first.click()),
    "sign-in": (None, "/sign-in", None),
}


def shoot(browser: Browser, room: Room, folder: Path) -> None:
    """Every screen in every look."""
    for theme in ("light", "dark"):
        for size, viewport in SIZES.items():
            for name, (person, path, act) in SCREENS.items():
                context = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce")
                if person:
                    context.add_cookies(room.cookies(person))
                page = context.new_page()
                page.goto(f"{room.url}/dashboard{path}")
                if act:
                    act(page)
                page.screenshot(path=folder / f"{name}-{size}-{theme}.png", full_page=name != "versions-sure")
                context.close()


if __name__ == "__main__":
    target, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30
    target.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_room(Path(scratch), steps) as opened,
        open_browser() as chromium,
    ):
        shoot(chromium, opened, target)

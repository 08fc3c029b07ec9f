"""The charts while steps arrive and while the gateway or the trainer is away: real processes, killed, and Chromium."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.services.labeling.browser import chromium_path, open_browser
from tests.services.test_commands import ENV, MODEL, TRIMTAB, demonstrations, trimtab
from trimtab.rounds.launchers.services import free_ports
from trimtab_client import ChannelOptions, TrainerClient, TrimtabError
from trimtab_client.v1 import trainer_pb2

RUN = "live"
BACK_MS = 120_000
pytestmark = [
    pytest.mark.slow,  # services start again and again
    pytest.mark.timeout(600),
    pytest.mark.skipif(chromium_path() is None, reason="no Chromium: apt-get install chromium, or CHROMIUM=…"),
]


@dataclass
class Site:
    """A trainer with one long SFT run, and a gateway before it; each can be killed and started again on its port."""

    folder: Path
    token: str
    settings: dict[str, dict[str, object]]
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings['gateway']['http_port']}"

    def start(self, name: str) -> None:
        flags = [part for key, value in self.settings[name].items() for part in ("--set", f"{key}={json.dumps(value)}")]
        self.processes[name] = subprocess.Popen([*TRIMTAB, "serve", name, *flags], env=ENV, text=True)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def start_run(self) -> None:
        """Begin the run, or go on with it, once the trainer answers."""
        config = trainer_pb2.SftConfig(data=str(self.folder / "stories.jsonl"), epochs=100_000, batch_size=4)
        config.stage.model = str(MODEL)
        config.stage.max_length = 64
        config.stage.checkpoint_every_steps = 5
        give_up = time.monotonic() + 120
        with self.trainer() as client:
            while True:
                try:
                    client.start(RUN, config)
                    return
                except TrimtabError:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(0.1)

    def trainer(self) -> TrainerClient:
        return TrainerClient(f"127.0.0.1:{self.settings['trainer']['port']}", ChannelOptions(retries=0))

    def reached(self) -> int:
        with self.trainer() as client:
            return client.status(RUN).step


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    demonstrations(folder)
    made = trimtab("keys", "add", "watcher", "--role", "train", "--file", str(folder / "keys.yaml"))
    assert made.returncode == 0, made.stderr
    trainer, gateway, http = free_ports(3)
    common: dict[str, object] = {"metrics_port": None, "log_level": "error"}
    auth = {"keys_file": str(folder / "keys.yaml")}
    settings = {
        "trainer": common | {"port": trainer, "folder": str(folder / "runs"), "store": str(folder / "store")},
        "gateway": common | {"port": gateway, "http_port": http, "trainer": f"127.0.0.1:{trainer}", "auth": auth},
    }
    site = Site(folder, made.stdout.strip(), settings)
    try:
        site.start("trainer")
        site.start("gateway")
        site.start_run()
        yield site
    finally:
        for name in list(site.processes):
            site.kill(name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("live")) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, site: Site) -> Page:
    """The charts, signed in, with what is drawn there."""
    context = browser.new_context(reduced_motion="reduce")
    context.add_cookies([{"name": "trimtab_dashboard", "value": site.token, "url": f"{site.url}/dashboard"}])
    page = context.new_page()
    page.clock.install()
    eventually(lambda: page.request.get(f"{site.url}/healthz").ok)
    page.goto(f"{site.url}/dashboard")
    expect(page.locator(".chart canvas").first).to_be_visible(timeout=BACK_MS)
    page.evaluate("window.sameAsBefore = true")
    return page


def eventually(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except Exception:
            if time.monotonic() > give_up:
                raise
        assert time.monotonic() < give_up, "it did not come true in time"
        time.sleep(0.05)


def points(page: Page) -> int:
    """Points of the loss chart; from step 1 to the last each step must be there once."""
    label = page.locator(".chart:not([hidden])").first.get_by_role("img").get_attribute("aria-label") or ""
    found = re.match(r"(\d+) points, steps (\d+) to (\d+); at step (\d+): loss ", label)
    assert found, label
    count, first, last, told = map(int, found.groups())
    assert (first, told) == (1, last) and count == last
    return count


def check_goes_on(page: Page, site: Site) -> None:
    """The page, never loaded anew, catches up with the run and grows with it."""
    expect(reconnecting(page)).to_be_hidden(timeout=BACK_MS)
    now = site.reached()
    eventually(lambda: points(page) > now + 3)
    assert page.evaluate("window.sameAsBefore")
    expect(page.locator("#trouble")).to_be_hidden(timeout=BACK_MS)
    expect(page.locator("#state")).to_have_text("sft · running", timeout=BACK_MS)


def reconnecting(page: Page) -> Locator:
    return page.get_by_text("reconnecting")


def test_points_come_while_the_run_goes_and_none_is_missing_after_the_gateway_was_away(site: Site, page: Page) -> None:
    check_goes_on(page, site)
    before = points(page)
    site.kill("gateway")
    expect(reconnecting(page)).to_be_visible(timeout=BACK_MS)
    eventually(lambda: site.reached() > before + 10)
    site.start("gateway")
    check_goes_on(page, site)


def test_points_stay_single_when_the_trainer_goes_back_to_its_checkpoint(site: Site, page: Page) -> None:
    eventually(lambda: points(page) > 6)
    site.kill("trainer")
    expect(reconnecting(page)).to_be_visible(timeout=BACK_MS)
    site.start("trainer")
    site.start_run()
    check_goes_on(page, site)


def test_a_connection_that_falls_silent_is_given_up(site: Site, page: Page) -> None:
    site.processes["gateway"].send_signal(signal.SIGSTOP)
    page.clock.fast_forward("00:45")
    expect(reconnecting(page)).to_be_visible(timeout=BACK_MS)
    site.processes["gateway"].send_signal(signal.SIGCONT)
    check_goes_on(page, site)


def test_who_is_signed_out_meanwhile_is_sent_to_the_form(site: Site, page: Page) -> None:
    page.context.clear_cookies()
    site.kill("gateway")
    site.start("gateway")
    page.wait_for_url("**/dashboard/sign-in", timeout=BACK_MS)

"""A real server process and a real browser, for browser tests and screenshots."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright


def chromium_path() -> str | None:
    """A Chromium of this machine, or None. CHROMIUM names another one."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=arguments)
        yield browser
        browser.close()


@contextmanager
def run_server(database: str, **settings: object) -> Iterator[str]:
    """`trimtab label serve` as a process on a free port; its address. SIGTERM at the end must end it with 0."""
    process, address = start_server(database, **settings)
    try:
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=20)
    assert code == 0, code


def start_server(database: str, *, port: int = 0, **settings: object) -> tuple[subprocess.Popen, str]:
    """The process and its address, once it serves."""
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.json"
        values = {"port": port, "database": database, "ready_file": str(ready), "log_level": "warning"} | settings
        flags = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        process = subprocess.Popen([sys.executable, "-m", "trimtab", "label", "serve", *flags])
        deadline = time.monotonic() + 60
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the server did not start: exit {process.returncode}")
            time.sleep(0.02)
        return process, f"http://127.0.0.1:{json.loads(ready.read_text())['port']}"

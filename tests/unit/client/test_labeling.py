"""Where the labeling client sends its token, and where never."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from trimtab_client import FailedPrecondition, LabelingClient


class Page(ThreadingHTTPServer):
    """Answers every request with `status` and keeps the tokens that it saw."""

    def __init__(self, status: int = 200, location: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.location = status, location
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers["authorization"])
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("location", self.server.location)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def running(page: Page) -> Iterator[Page]:
    thread = Thread(target=page.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield page
    finally:
        page.shutdown()
        thread.join()
        page.server_close()


@pytest.mark.parametrize(
    "address",
    ["http://page:7110", "http://10.0.0.1:7110", "HTTP://page", "http://localhost.example", "http://[::2]:1", "page:1"],
)
def test_a_token_never_travels_in_the_clear_to_another_machine(address):
    with pytest.raises(ValueError, match=r"^address: .* TLS only: give its https:// address"):
        LabelingClient(address, "t")


@pytest.mark.parametrize(
    "address", ["http://localhost:1/", "http://127.9.9.9:1", "http://[::1]:1", "https://page:7110"]
)
def test_it_may_go_to_this_machine_and_over_tls(address):
    assert LabelingClient(address, "t").address == address.rstrip("/")


def test_a_redirect_does_not_take_the_token_along():
    with running(Page()) as elsewhere, running(Page(302, f"{elsewhere.address}/api/v1/campaigns")) as page:
        with pytest.raises(FailedPrecondition, match="HTTP 302"):
            LabelingClient(page.address, "t").campaigns()
        assert page.tokens == ["Bearer t"] and elsewhere.tokens == []


def test_no_proxy_reads_a_token_that_stays_on_this_machine(monkeypatch):
    with running(Page()) as proxy, running(Page()) as page:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        assert LabelingClient(page.address, "t").campaigns() == []
        assert page.tokens == ["Bearer t"] and proxy.tokens == []

"""The ranking page shows Prometheus how it is used, by pattern and never by what was asked for."""

import socket
import time
import urllib.request
from pathlib import Path

from tests.services.labeling.browser import run_server


def test_requests_are_counted_on_a_port_of_their_own(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with run_server(str(tmp_path / "labels.sqlite"), metrics_port=port) as address:
        assert urllib.request.urlopen(f"{address}/healthz", timeout=20).status == 200
        counted = 'trimtab_requests_total{code="200",method="/healthz",service="http"}'
        deadline = time.monotonic() + 20  # a request is counted once its answer is sent
        while counted not in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode():
            assert time.monotonic() < deadline
            time.sleep(0.05)

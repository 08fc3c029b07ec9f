"""An HTTP server's requests are counted by route pattern and status, whatever path was asked for."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from trimtab.runtime.http_metrics import NO_ROUTE, HttpMetrics
from trimtab.runtime.metrics import Metrics


def test_requests_are_counted_by_route_and_status() -> None:
    app, metrics = FastAPI(), Metrics()

    @app.get("/tasks/{task}")
    def read(task: int) -> int:
        if task == 13:
            raise RuntimeError
        return task

    client = TestClient(HttpMetrics(app, metrics))  # type: ignore[arg-type]
    assert client.get("/tasks/1").status_code == 200
    assert client.get("/tasks/2").status_code == 200
    assert client.get("/tasks/x").status_code == 422
    assert client.get("/secret/path").status_code == 404
    with pytest.raises(RuntimeError):
        client.get("/tasks/13")
    route = "/tasks/{task}"
    counted = {code: metrics.requests.labels("http", route, code)._value.get() for code in ("200", "422", "500")}
    assert counted == {"200": 2.0, "422": 1.0, "500": 1.0}
    assert metrics.requests.labels("http", NO_ROUTE, "404")._value.get() == 1.0
    assert metrics.request_seconds.labels("http", route)._sum.get() > 0

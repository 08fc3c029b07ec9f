"""A server killed with SIGKILL in the middle of hundreds of submits loses nothing that it acknowledged."""

import http.client
import json
import os
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from tests.services.labeling.browser import start_server
from trimtab.labeling.campaigns import CampaignPlan, create_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.exporting import export_rows
from trimtab.labeling.importing import import_rows
from trimtab.labeling.judgments import submission_count
from trimtab.labeling.labelers import add_labeler
from trimtab.labeling.rows import read_rows
from trimtab.labeling.tables import Labeler, Lease, Task
from trimtab.labeling.vocabulary import Role

WORKERS = 8


class Labelers:
    """Eight programs that send rankings over the API as fast as they can, and send again whatever was not answered."""

    def __init__(self, port: int, tokens: list[str], tasks: list[list[int]], kill_after: int) -> None:
        self.port = port
        self.tokens = tokens
        self.tasks = tasks
        self.kill_after = kill_after
        self.acknowledged: list[tuple[int, str]] = []
        self.lock = threading.Lock()
        self.reached = threading.Event()
        self.server_is_back = threading.Event()

    def work(self, worker: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        for task in self.tasks[worker]:
            key = f"submit-{worker}-{task}"
            receipt = self._send(connection, worker, task, {"key": key, "ranks": [2, 1, 1, 3]})
            with self.lock:
                self.acknowledged.append((receipt["task_id"], key))
                if len(self.acknowledged) == self.kill_after:
                    self.reached.set()
        connection.close()

    def _send(self, connection: http.client.HTTPConnection, worker: int, task: int, body: dict) -> dict:
        headers = {"authorization": f"Bearer {self.tokens[worker]}", "content-type": "application/json"}
        for _ in range(5):
            try:
                connection.request("POST", f"/api/v1/tasks/{task}/judgment", json.dumps(body), headers)
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                assert self.server_is_back.wait(60)
                continue
            assert answer.status == 200, (answer.status, content[:300])
            return json.loads(content)
        raise AssertionError("the server did not come back")


def hand_out(database: Database) -> list[list[int]]:
    """Lease every task to one of the labelers in turn; the tasks' ids by labeler."""
    now = datetime.now(UTC)
    handed: list[list[int]] = [[] for _ in range(WORKERS)]
    with database.write() as session:
        labelers = list(session.scalars(select(Labeler.id).order_by(Labeler.id)))
        for i, task in enumerate(session.scalars(select(Task.id).order_by(Task.position))):
            handed[i % WORKERS].append(task)
            given = {"task_id": task, "labeler_id": labelers[i % WORKERS], "order": [2, 0, 3, 1]}
            session.add(Lease(**given, granted_at=now, expires_at=now + timedelta(hours=1)))
    return handed


@pytest.mark.parametrize(
    ("database_url", "submits"),
    [
        ("sqlite", 250),
        pytest.param("sqlite", 1000, marks=pytest.mark.slow),
        pytest.param("postgresql", 1000, marks=pytest.mark.slow),
    ],
    indirect=["database_url"],
)
def test_every_acknowledged_ranking_is_there_once_after_sigkill(database_url, submits, now):
    kill_after = 2 * submits // 5
    database = Database(database_url)
    database.migrate()
    with database.write() as session:
        tokens = [add_labeler(session, f"p{i}", Role.LABELER, now)[1] for i in range(WORKERS)]
        create_campaign(session, CampaignPlan("c"), None, datetime.now(UTC))
    rows = [{"prompt": f"p{i}", "responses": [f"{i}.{j}" for j in range(4)], "task": f"t{i}"} for i in range(submits)]
    import_rows(database, "c", read_rows(json.dumps(row) for row in rows), now)
    tasks = hand_out(database)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]

    server, _ = start_server(database_url, port=port)
    labelers = Labelers(port, tokens, tasks, kill_after)
    with ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(labelers.work, i) for i in range(WORKERS)]
        while not labelers.reached.wait(0.5):
            assert not any(worker.done() for worker in workers), [worker.exception() for worker in workers]
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        with labelers.lock:
            before_restart = list(labelers.acknowledged)
        with database.read() as session:
            found = submission_count(session)
        assert found >= len(before_restart) >= kill_after
        server, _ = start_server(database_url, port=port)
        labelers.server_is_back.set()
        for worker in workers:
            worker.result()
    server.terminate()
    assert server.wait(timeout=20) == 0

    exported = Counter(row["task"] for row in export_rows(database, "c"))
    assert len(before_restart) < submits
    assert exported == dict.fromkeys((f"t{i}" for i in range(submits)), 1)
    assert len(labelers.acknowledged) == submits == len({key for _, key in labelers.acknowledged})
    with database.read() as session:
        assert submission_count(session) == submits
    database.close()

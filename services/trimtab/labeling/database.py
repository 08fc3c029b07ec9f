"""Where labeling keeps its data: SQLite by default, PostgreSQL by URL; one way to read, one way to write.

A write that returned is on the disk: SQLite runs in WAL mode with synchronous=FULL, PostgreSQL as its server is set
(its default waits for the disk, too). The schema is Alembic's (`migrations/`); `Database.migrate` brings it up to date.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from trimtab.labeling.errors import DatabaseError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_S = 30
MIGRATION_LOCK = 7_110_001  # any number of our own: servers that start together migrate one after the other


class Database:
    """One database. Sessions do not expire on commit: what they read may be used after them."""

    def __init__(self, url: str) -> None:
        """`url` is a path of a SQLite file, or an SQLAlchemy URL; DatabaseError where it is neither."""
        parsed = _parse(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        try:
            options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if self.is_sqlite else {}
            self._engine = create_engine(parsed, pool_pre_ping=not self.is_sqlite, pool_size=16, **options)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise DatabaseError(f"no driver for {parsed.drivername}: pip install 'trimtab[postgres]'") from error
        self._writer = self._engine
        self._write_lock = threading.Lock()
        if self.is_sqlite:
            _prepare_sqlite(self._engine)
            self._writer = self._engine.execution_options(begin_immediate=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state and changes nothing."""
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: committed and durable when the block ends, undone where it raises.

        SQLite has one writer at a time. The lock queues this process's own, whom SQLite would make sleep and poll.
        """
        if not self.is_sqlite:
            with Session(self._writer, expire_on_commit=False) as session, session.begin():
                yield session
            return
        with self._write_lock, Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def migrate(self) -> None:
        """Bring the schema up to date; servers may start together. DatabaseError where there is no database."""
        config = AlembicConfig()
        config.set_main_option("script_location", str(MIGRATIONS))
        try:
            with self._write_lock, self._writer.begin() as connection:
                if not self.is_sqlite:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except OperationalError as error:
            raise DatabaseError(f"cannot open the database: {_reason(error)}") from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _parse(url: str) -> URL:
    if "://" not in url:
        path = Path(url).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return URL.create("sqlite", database=str(path))
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise DatabaseError(f"database: not a path or a database URL ({error})") from error
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _prepare_sqlite(engine: Any) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("begin_immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _reason(error: OperationalError) -> str:
    return str(error.orig).strip().splitlines()[0]

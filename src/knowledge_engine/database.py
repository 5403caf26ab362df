"""The state's tables, and the database that they are in: opened, brought up to date, never shared over a network.

SQLite, or any database SQLAlchemy speaks; `state.py` is the only one that asks it anything.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event as sa_event

from knowledge_engine.errors import IntegrityError, Reason
from knowledge_engine.failpoints import failpoint
from knowledge_engine.files import demand_local

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Time(sa.types.TypeDecorator[datetime]):
    """An aware UTC time as integer microseconds since 1970: exact, ordered, the same in every database."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else int((value - EPOCH).total_seconds() * 1_000_000)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value / 1_000_000, UTC)


METADATA = sa.MetaData()

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("progress", sa.Text),
    sa.Column("create_time", _Time, nullable=False),
    sa.Column("start_time", _Time),
    sa.Column("end_time", _Time),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("crashes", sa.Integer, nullable=False, default=0),
    sa.Column("creator", sa.String(63), nullable=False, default=""),
    sa.Column("tracker_run", sa.Text),
    sa.Column("last_sequence", sa.BigInteger, nullable=False, default=0),
    sa.Column("worker_pid", sa.Integer),
    # When a job was queued, or queued again on request: an interruption costs it no place.
    sa.Column("queue_time", _Time),
    sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("checkpoint_step", sa.BigInteger),
    # What its worker is expected to take of its device.
    sa.Column("memory_bytes", sa.BigInteger),
    # Counts the current attempt's signs of life. Whether it moves says who lives; no two clocks are ever compared.
    sa.Column("beat", sa.BigInteger, nullable=False, server_default="0"),
    # False from the end of a job until what it left is cleared away and its tracker knows.
    sa.Column("is_seen_off", sa.Boolean, nullable=False, server_default=sa.true()),
    # Who runs the current attempt: a pid alone may be reused, with this it may not.
    sa.Column("worker_identity", sa.String(80)),
)

REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("creator", sa.String(63), primary_key=True),
    sa.Column("request_id", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(63), sa.ForeignKey("jobs.id"), nullable=False),
)

# Memory held by whoever is no job: the engine, above all. What jobs hold stands with them.
LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("holder", sa.String(80), primary_key=True),
    sa.Column("device", sa.String(16), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("job_id", sa.String(63), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("create_time", _Time, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
)

DATASETS = sa.Table(
    "datasets",
    METADATA,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("num_rows", sa.BigInteger, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("create_time", _Time, nullable=False),
    sa.Column("parents", sa.Text, nullable=False),
    sa.Column("job_id", sa.String(63), nullable=False),
)


SERVICES = sa.Table(
    "services",
    METADATA,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("trouble", sa.Text, nullable=False),
    sa.Column("update_time", _Time, nullable=False),
)


def open_database(url: str, *, migrate: bool, busy_timeout_seconds: float) -> sa.Engine:
    """The database, its schema brought up to date if so told. A write waits so long for another one's lock.

    Raises:
        IntegrityError: STATE_NEWER when a newer release wrote it.
        InvalidSpecError: SETTINGS_INVALID for a folder on a network file system.
    """
    if url.startswith("sqlite:///"):
        folder = Path(url.removeprefix("sqlite:///")).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        demand_local(folder)
    # A thread never waits for a connection: it would look like a store that does not answer.
    engine = sa.create_engine(url, connect_args={"timeout": busy_timeout_seconds}, max_overflow=-1)
    if engine.dialect.name == "sqlite":
        _use_wal(engine)
    if migrate:
        _migrate(engine)
    return engine


def _use_wal(engine: sa.Engine) -> None:
    """WAL with synchronous=FULL: an acknowledged write survives a power cut, and readers never wait for a writer."""

    @sa_event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, record: object) -> None:
        # SQLAlchemy begins transactions below; the driver's own guesses would make BEGIN IMMEDIATE impossible.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa_event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        # A writer takes its lock at once: upgrading a read transaction could fail without waiting.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.connect().execution_options(write=True) as connection, connection.begin():
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise IntegrityError(
                f"a newer release wrote this state (schema {current}); start that one, or another data directory",
                reason=Reason.STATE_NEWER,
                schema=current,
            )
        config.attributes["connection"] = connection
        sa_event.listen(connection, "after_cursor_execute", lambda *_: failpoint("migrate.statement"))
        command.upgrade(config, "head")

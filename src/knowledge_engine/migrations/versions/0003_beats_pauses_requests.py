"""Workers are watched by their beats, jobs can be paused, calls repeated, memory held."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("queue_time", sa.BigInteger))
    op.execute("UPDATE jobs SET queue_time = create_time")
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("checkpoint_step", sa.BigInteger))
    op.add_column("jobs", sa.Column("memory_bytes", sa.BigInteger))
    op.add_column("jobs", sa.Column("beat", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("worker_identity", sa.String(80)))
    op.add_column("jobs", sa.Column("is_seen_off", sa.Boolean, nullable=False, server_default=sa.true()))
    op.drop_column("jobs", "worker_started")
    op.drop_column("jobs", "lease_expires")
    op.create_table(
        "requests",
        sa.Column("creator", sa.String(63), primary_key=True),
        sa.Column("request_id", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(63), sa.ForeignKey("jobs.id"), nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("holder", sa.String(80), primary_key=True),
        sa.Column("device", sa.String(16), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
    )

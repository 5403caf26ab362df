"""How the latest work with each outside service went."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "services",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("trouble", sa.Text, nullable=False),
        sa.Column("update_time", sa.BigInteger, nullable=False),
    )

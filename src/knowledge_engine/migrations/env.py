"""Runs the migrations on the connection that `database.py` hands over."""

from alembic import context

from knowledge_engine.database import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()

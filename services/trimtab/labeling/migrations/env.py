"""Alembic's entry: runs in the connection that `Database.migrate` holds, or for `alembic revision` in development."""

from alembic import context

from trimtab.labeling.tables import Table

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    transaction_per_migration=False,
)
context.run_migrations()

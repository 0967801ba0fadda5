"""Run by Alembic: migrates over the connection that the store hands it."""

from alembic import context

from autojac.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

"""Run by Alembic: migrates over the connection that the store hands it."""

from alembic import context

from autojac.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

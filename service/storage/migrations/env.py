"""Run by Alembic: apply the steps on the connection that the caller holds a transaction on."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()

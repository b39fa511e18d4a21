"""Alembic's entry point: runs revisions on the connection that `d2lora.database.migrate` opened."""

from alembic import context

from d2lora.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite cannot alter a table in place
)
context.run_migrations()

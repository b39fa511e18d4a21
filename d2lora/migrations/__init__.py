"""Alembic's revisions of the database schema; run by `d2lora.database.migrate`."""

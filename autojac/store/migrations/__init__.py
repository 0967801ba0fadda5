"""Alembic environment of the plan store."""

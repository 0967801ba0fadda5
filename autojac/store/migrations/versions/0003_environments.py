"""Measurements of environments, predicted times of trials, and whether a plan's search was finished."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, and both columns."""
    op.create_table(
        "environments",
        sa.Column("env_key", sa.String(64), nullable=False),
        sa.Column("env", sa.Text(), nullable=False),
        sa.Column("measured", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("env_key", name="pk_environments"),
    )
    op.add_column("trials", sa.Column("predicted", sa.Float(), nullable=True))
    op.add_column("plans", sa.Column("finished", sa.Boolean(), nullable=False, server_default=sa.true()))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("plans") as batch:
        batch.drop_column("finished")
    with op.batch_alter_table("trials") as batch:
        batch.drop_column("predicted")
    op.drop_table("environments")

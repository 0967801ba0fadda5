"""Patterns and their colorings."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "arrays",
        sa.Column("pattern", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("pattern", "kind", name="pk_arrays"),
    )
    op.create_table(
        "plan_patterns",
        sa.Column("plan_id", sa.Integer(), nullable=False),
        sa.Column("pattern", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name="fk_plan_patterns_plan_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("plan_id", "pattern", name="pk_plan_patterns"),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("plan_patterns")
    op.drop_table("arrays")

"""Plans and trials."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "plans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("op_key", sa.String(64), nullable=False),
        sa.Column("env_key", sa.String(64), nullable=False),
        sa.Column("op", sa.Text(), nullable=False),
        sa.Column("env", sa.Text(), nullable=False),
        sa.Column("function_name", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("effort", sa.String(16), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("memory_bytes", sa.BigInteger()),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("updated_at", sa.String(40), nullable=False),
        sa.Column("refuted_reason", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint("op_key", "env_key", name="uq_plans_op_key_env_key"),
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("plan_id", sa.Integer(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("dispersion", sa.Float()),
        sa.Column("memory_bytes", sa.BigInteger()),
        sa.Column("reason", sa.Text()),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name="fk_trials_plan_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
        sa.UniqueConstraint("plan_id", "ordinal", name="uq_trials_plan_id_ordinal"),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("trials")
    op.drop_table("plans")

"""Accounts and transfers, as the first version of the ledger made them by itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
TIME = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "account",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.CheckConstraint("balance >= 0", name="account_balance_not_negative"),
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "transfer",
        sa.Column("id", ID, primary_key=True),
        sa.Column("from_id", ID, sa.ForeignKey("account.id"), nullable=False),
        sa.Column("to_id", ID, sa.ForeignKey("account.id"), nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("memo", sa.String(200), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.CheckConstraint("amount > 0", name="transfer_amount_positive"),
        mysql_charset="utf8mb4",
    )
    op.create_index("ix_transfer_from_id", "transfer", ["from_id"])
    op.create_index("ix_transfer_to_id", "transfer", ["to_id"])

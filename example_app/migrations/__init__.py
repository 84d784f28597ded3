"""The history of the ledger's tables, as Alembic keeps it."""

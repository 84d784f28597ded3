"""What Alembic runs for each command: over the connection that `example_app.schema` has made."""

from __future__ import annotations

from alembic import context

from example_app.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot change a table in place
)
with context.begin_transaction():
    context.run_migrations()

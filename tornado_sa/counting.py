"""How many statements a block of code sends."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from sqlalchemy import event

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.database import Database
from tornado_sa.outer import CONTROL, OURS


class count_queries:
    """Count the statements that are sent over ``db`` inside the block.

    ::

        with count_queries(db, expected=2):
            await fetch("/notes")

    Counted is what goes over ``engine``, ``binds`` and ``reader``, whoever sends
    it; one with many sets of parameters counts once. What begins and ends
    transactions and savepoints does not count. It is a plain ``with`` on an
    `.AsyncDatabase` too.

    ``expected``
        How many there have to be. If there are more or less, the end of the
        block raises ``AssertionError``, with all of them.
    """

    def __init__(self, db: Database | AsyncDatabase, *, expected: int | None = None) -> None:
        #: The statements, in the order in which they were sent, without their parameters.
        self.statements: list[str] = []
        self._database = db
        self._expected = expected

    def __repr__(self) -> str:
        listed = [f"\n{i:4}. {' '.join(one.split())}" for i, one in enumerate(self.statements, 1)]
        return f"<{self.count} statements>{''.join(listed)}"

    @property
    def count(self) -> int:
        """How many statements were sent so far."""
        return len(self.statements)

    def __enter__(self) -> Self:
        self._engines = self._database._sync_engines()
        for engine in self._engines:
            event.listen(engine, "before_cursor_execute", self._note)
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for engine in self._engines:
            event.remove(engine, "before_cursor_execute", self._note)
        if error is None and self._expected not in (None, self.count):
            raise AssertionError(f"expected {self._expected} statements, and got {self!r}")

    def _note(self, _connection: Any, _cursor: Any, statement: str, *rest: Any) -> None:
        context = rest[1]
        # What begins and ends transactions is left out: outside of isolated(), drivers send most of
        # it themselves. So the numbers are the same with it and without.
        ours = context is not None and context.execution_options.get(OURS)
        if not ours and not CONTROL.match(statement):
            self.statements.append(statement)

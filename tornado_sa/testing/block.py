"""The block of code in which a database is isolated."""

from __future__ import annotations

import asyncio
from types import TracebackType

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.bridge import cross
from tornado_sa.database import Database
from tornado_sa.errors import TornadoSAError
from tornado_sa.testing.isolation import Isolation


class isolated:
    """Roll back everything that is committed through ``db`` inside the block.

    ::

        with isolated(db):  # async with, on an AsyncDatabase
            await fetch("/notes", method="POST", body="text=hello")

    Handlers over real sockets, ``db.begin()`` and sessions of
    ``db.sessionmaker()`` all work on one connection, in one outer transaction.
    What they commit is a savepoint in it: later units of work see it, and at
    the end it is gone. A unit of work that fails undoes only its own work.
    Deferred constraints are checked where they commit, and ``after_commit``
    callbacks run.

    Units of work have the connection one after the other, in the order in which
    they begin; concurrent requests wait in `.BaseHandler.prepare`.

    ``timeout``
        How long one waits, in seconds. Then it raises `.TornadoSAError`, which
        says who has the connection.
    ``capture_after_commit``
        Keep the calls of `.Database.after_commit` in ``calls`` of what the
        block yields, an `Isolation`, instead of making them.

    Outside of it remains what uses ``db.engine`` directly. An isolation level
    that a transaction asks for is ignored. It connects when it is first needed.

    Raises `.TornadoSAError` inside another such block of ``db``, while units of
    work are open, and at its end if some still are; and `.ConfigurationError`
    for a database with two-phase commit.
    """

    def __init__(
        self,
        db: Database | AsyncDatabase,
        *,
        timeout: float = 5.0,
        capture_after_commit: bool = False,
    ) -> None:
        self._database = db
        self._options = timeout, capture_after_commit
        self._isolation: Isolation | None = None

    def __enter__(self) -> Isolation:
        if isinstance(self._database, AsyncDatabase):
            raise TornadoSAError(
                "isolated() on an AsyncDatabase has to be awaited. Write `async with"
                " isolated(db):`, or use the fixture isolated_db."
            )
        return self.switch_on()

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        isolation = self._take()
        try:
            if error is None:
                isolation.check_left()
        finally:
            isolation.switch_off()
            isolation.roll_back()

    async def __aenter__(self) -> Isolation:
        if isinstance(self._database, Database):
            raise TornadoSAError(
                "isolated() on a Database has nothing to wait for. Write `with isolated(db):`."
            )
        return self.switch_on()

    async def __aexit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        isolation = self._take()
        try:
            await settle(isolation)
            if error is None:
                isolation.check_left()
        finally:
            isolation.switch_off()
            await asyncio.shield(cross(isolation.roll_back))

    def switch_on(self) -> Isolation:
        """Begin, for the fixtures, whose end is another."""
        isolation = Isolation(self._database, *self._options)
        isolation.switch_on()
        self._isolation = isolation
        return isolation

    def _take(self) -> Isolation:
        isolation, self._isolation = self._isolation, None
        assert isolation is not None
        return isolation


async def settle(isolation: Isolation, seconds: float = 1.0) -> None:
    """Give sessions that are being closed a moment."""
    deadline = asyncio.get_running_loop().time() + seconds
    while isolation.in_use and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.002)

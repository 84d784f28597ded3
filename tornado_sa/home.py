"""The home of an async pool: the one event loop in which its connections work."""

from __future__ import annotations

from asyncio import AbstractEventLoop

from tornado_sa.errors import TornadoSAError
from tornado_sa.turns import running_loop


class Home:
    """The event loop in which a pool of an `.AsyncDatabase` has its connections.

    Drivers wait for their sockets in the loop where they connected. Used in
    another loop, some fail with obscure errors and some only under load, so all
    are kept at home. A pool moves when its home is closed, or when it is empty.
    """

    def __init__(self) -> None:
        #: The loop; None before the first.
        self.loop: AbstractEventLoop | None = None

    def is_here(self) -> bool:
        """False in another event loop. Outside of any there is no I/O that could go wrong."""
        loop = running_loop()
        return loop is self.loop or loop is None

    def move(self, is_empty: bool) -> None:
        """Make the loop that runs here the home. Raises `.TornadoSAError` if that cannot be."""
        if self.loop is not None and not self.loop.is_closed() and not is_empty:
            raise TornadoSAError(
                "An AsyncDatabase was used in one event loop while it has connections in another,"
                " which is not closed; they work in that one only. Make an AsyncDatabase for each"
                " loop that runs at the same time; where one loop follows another, write `await"
                " db.dispose()` at the end of the first."
            )
        self.loop = running_loop()

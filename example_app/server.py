"""A server that can be asked to finish what it has begun."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)

logger = logging.getLogger("example_app")

# How long an idle connection is kept for a request that may be on its way already, in seconds.
LINGER = 0.1


class DrainingServer(HTTPServer):
    """An ``HTTPServer`` that knows which of its connections owe an answer."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Called by the constructor, with its arguments."""
        super().initialize(*args, **kwargs)
        self._requests = 0
        self._owing: set[object] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        """Called when a connection begins to wait for a request: the one before is answered."""
        self._answered(server_conn)
        if cast(HTTP1Connection, request_conn).stream.closed():
            return HTTPMessageDelegate()  # sent on after the last answer: do nothing untold
        delegate = super().start_request(server_conn, request_conn)
        return _RequestNoted(delegate, lambda: self._asked(server_conn))

    def on_close(self, server_conn: object) -> None:
        """Called when a connection is gone."""
        self._answered(server_conn)
        super().on_close(server_conn)

    async def drain(self, timeout: float) -> None:
        """Stop accepting connections, answer the requests in flight, close the connections.

        Requests that are not answered after ``timeout`` seconds are cut off.
        """
        self.stop()
        # Answers say "Connection: close" from now on, or a busy client could go on for ever.
        self.conn_params.no_keep_alive = True
        try:
            async with asyncio.timeout(timeout):
                seen = -1
                while self._owing or seen != self._requests:
                    seen = self._requests
                    await self._idle.wait()
                    await asyncio.sleep(LINGER)
        except TimeoutError:
            logger.warning("Cut off after %g s: %d unanswered requests", timeout, len(self._owing))
        await self.close_all_connections()

    def _asked(self, server_conn: object) -> None:
        self._requests += 1
        self._owing.add(server_conn)
        self._idle.clear()

    def _answered(self, server_conn: object) -> None:
        self._owing.discard(server_conn)
        if not self._owing:
            self._idle.set()


class _RequestNoted(HTTPMessageDelegate):
    """Passes a request on, and calls ``asked()`` when its headers have come."""

    def __init__(self, delegate: HTTPMessageDelegate, asked: Callable[[], None]) -> None:
        self._delegate = delegate
        self._asked = asked

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        self._asked()
        return self._delegate.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        self._delegate.finish()

    def on_connection_close(self) -> None:
        self._delegate.on_connection_close()

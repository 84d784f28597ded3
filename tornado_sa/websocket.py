"""The WebSocket handlers: one session per event, and no connection between events."""

from __future__ import annotations

from tornado.websocket import WebSocketHandler

from tornado_sa.handlers import AsyncSessionHandler, SessionHandler


class SessionWebSocketHandler(SessionHandler, WebSocketHandler):
    """A ``WebSocketHandler`` with a plain ``Session`` for each event.

    Each `open`, `on_message`, `on_ping`, `on_pong` and `on_close` is a unit of
    work of its own, which ends with the method, or with its coroutine: what it
    did not commit is rolled back. Between events a socket holds no connection.
    ``self.session`` is the session of the event it is asked for in. Elsewhere it
    raises `.NoActiveScope`, and in a task that outlives its event, `.ScopeClosed`.
    Events can overlap: an `on_ping` comes during an `on_message` that waits.
    The handshake (`prepare` and ``get``) is a unit of work that ends before `open`.

    An exception in an event closes the socket as it does without us. `on_close`
    is called after every `open` that returned, also where the client just went
    away, and it comes after the event that is running then: none is broken
    off. ``cancel_on_disconnect`` is about the handshake only.

    On an `.AsyncDatabase` the methods, ``def`` or ``async def``, run under the
    bridge. There `on_ping` and `on_close`, which Tornado does not wait for, are
    tasks of their own, and ``await db.dispose()`` waits for them. An ``async def
    on_close`` is such a task on every database; Tornado alone would never run it.
    """


class AsyncSessionWebSocketHandler(AsyncSessionHandler, WebSocketHandler):
    """A ``WebSocketHandler`` with an ``AsyncSession`` for each event, on an `.AsyncDatabase`.

    See `SessionWebSocketHandler`. To use the session, write ``async def``:
    also `on_close`, which Tornado alone would never run, and `on_ping`. These two
    are tasks that ``await db.dispose()`` waits for.
    """

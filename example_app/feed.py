"""The live feed: every transfer, to everybody who listens, as soon as it is committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tornado.escape import json_encode
from tornado.websocket import WebSocketClosedError

from example_app.database import AnyDatabase, read
from example_app.errors import Refused
from example_app.fields import Fields
from example_app.models import Transfer
from example_app.money import money
from tornado_sa import SessionWebSocketHandler

logger = logging.getLogger("example_app")

# How often to look for what other processes have committed, in seconds. What this process has
# committed is looked for at once.
POLL_SECONDS = 0.5

# How many ids back to look. Ids are given out before the COMMIT, so a transfer can become visible
# after one with a larger id; but not after thousands of them.
LOOK_BACK = 1000

# Transfers that are told at a time. The rest waits for the next look.
MAX_NEWS = 500

# Messages that a client may leave unread before it is sent away: they are kept in memory.
MAX_UNREAD = 1000

# Transfers that a client gets at a time when it asks for what it has missed.
MAX_MISSED = 200

GOING_AWAY = 1001
INVALID_DATA = 1007
TRY_AGAIN_LATER = 1013


class Feed:
    """Who listens in this process, and what they have been told."""

    def __init__(self, db: AnyDatabase) -> None:
        self._db = db
        self._listeners: set[FeedHandler] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def wake(self) -> None:
        """There may be something new. What handlers ask for with ``after_commit``."""
        self._wake.set()

    def join(self, listener: FeedHandler) -> None:
        """Tell ``listener`` from now on. While somebody listens, a task looks at the database."""
        if self._closed:
            listener.close(GOING_AWAY, "The server is going away.")
            return
        self._listeners.add(listener)
        if self._task is None:
            self._task = asyncio.create_task(self._tell(), name="feed")

    def leave(self, listener: FeedHandler) -> None:
        """Forget ``listener``."""
        self._listeners.discard(listener)
        if not self._listeners and self._task is not None:
            self._task.cancel()
            self._task = None

    async def close(self) -> None:
        """Say goodbye to everybody, at shutdown."""
        self._closed = True
        task = self._task
        for listener in list(self._listeners):
            listener.close(GOING_AWAY, "The server is going away.")
            self.leave(listener)
        if task is not None:
            await asyncio.wait([task])

    async def _tell(self) -> None:
        told: set[int] | None = None
        while True:
            self._wake.clear()
            try:
                if told is None:
                    told = set(await read(self._db, "feed", _latest_ids))
                for transfer in await read(self._db, "feed", _news, told):
                    told.add(transfer["id"])
                    for listener in list(self._listeners):
                        listener.send(transfer)
                told = {one for one in told if one > max(told) - LOOK_BACK}
            except Exception as error:  # such as a database that is away for a moment
                logger.warning("The feed waits for the database: %s", type(error).__name__)
                await asyncio.sleep(POLL_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)


class FeedHandler(SessionWebSocketHandler):
    """A WebSocket that says each transfer as JSON, as ``/transfers/7`` does, and in words.

    A client that sends ``{"after": 7}`` is told what it has missed since then.
    """

    def open(self, *args: str, **kwargs: str) -> None:
        """Called when the socket is there."""
        self._unread = 0
        self.set_nodelay(True)
        self.settings["feed"].join(self)

    def on_message(self, message: str | bytes) -> None:
        """Called for each message: a unit of work of its own, whose session ends with it."""
        try:
            if isinstance(message, bytes):
                raise Refused(400, "The message must be text.")
            fields = Fields(message.encode(errors="replace"), "after")
            after = fields.integer("after", least=0)
        except Refused as refused:
            self.close(INVALID_DATA, refused.message[:100])
            return
        for transfer in _after(self.session, after):
            self.send(transfer)

    def on_close(self) -> None:
        """Called when the socket is gone."""
        self.settings["feed"].leave(self)

    def send(self, transfer: dict[str, Any]) -> None:
        """Send one message, without waiting for a client that is slow to read."""
        if self._unread >= MAX_UNREAD:
            self.close(TRY_AGAIN_LATER, "You read too slowly.")
            return
        with contextlib.suppress(WebSocketClosedError):
            sent = self.write_message(json_encode(transfer))
            self._unread += 1
            sent.add_done_callback(self._sent)

    def _sent(self, sent: asyncio.Future[None]) -> None:
        self._unread -= 1
        sent.exception()  # a client that went away is no error


def _latest_ids(session: Session) -> list[int]:
    newest = session.scalar(select(func.max(Transfer.id))) or 0
    return [0, *session.scalars(select(Transfer.id).where(Transfer.id > newest - LOOK_BACK))]


def _news(session: Session, told: set[int]) -> list[dict[str, Any]]:
    """The transfers that nobody has been told of yet."""
    since = max(told) - LOOK_BACK
    ids = session.scalars(select(Transfer.id).where(Transfer.id > since).order_by(Transfer.id))
    new = [one for one in ids if one not in told][:MAX_NEWS]
    transfers = session.scalars(select(Transfer).where(Transfer.id.in_(new)).order_by(Transfer.id))
    return [_message(transfer) for transfer in (transfers if new else ())]


def _after(session: Session, ident: int) -> list[dict[str, Any]]:
    transfers = session.scalars(
        select(Transfer).where(Transfer.id > ident).order_by(Transfer.id).limit(MAX_MISSED)
    )
    return [_message(transfer) for transfer in transfers]


def _message(transfer: Transfer) -> dict[str, Any]:
    return {
        **transfer.as_json(),
        "from_owner": transfer.source.owner,
        "to_owner": transfer.target.owner,
        "shown": money(transfer.amount, transfer.source.currency),
    }

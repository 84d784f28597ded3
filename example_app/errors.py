"""What the ledger says no with."""

from __future__ import annotations

from tornado.web import HTTPError


class Refused(HTTPError):
    """An error that is the client's to mend, with a message that says how.

    Tornado sends an ``HTTPError``'s message to the log only; this one is for
    the client, and `.LedgerHandler` puts it into the response.
    """

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(status_code)
        self.message = message

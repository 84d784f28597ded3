"""What all handlers share: what only reads, how errors are told, and how money is moved."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar

from tornado.web import HTTPError, RequestHandler

from example_app.errors import Refused
from example_app.fields import Arguments
from example_app.ledger import Order, answer_once
from example_app.models import Answer
from tornado_sa import SessionHandler

_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",  # whatever is not named below, such as a script in the page
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


class LedgerHandler(SessionHandler):
    """The base of the handlers.

    What a GET reads comes over read-only connections. A verb that writes is
    ``@transactional``: its COMMIT comes before the response, so that no client
    is told of something that was not stored.
    """

    read_only_methods: ClassVar[frozenset[str]] = frozenset({"GET"})

    def set_default_headers(self) -> None:
        """Keep browsers from taking an answer for something that it is not."""
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", _CONTENT_SECURITY_POLICY)
        self.set_header("Referrer-Policy", "same-origin")

    def query(self, *names: str) -> Arguments:
        """The arguments of the query string, of which ``names`` are known."""
        return Arguments(self.request.query_arguments, *names)

    def move_money(self, order: Order, key: str | None) -> Answer:
        """Carry out ``order`` once, and tell those who listen to the feed when it is committed."""
        answer = answer_once(self.session, order, key)
        self.after_commit(self.settings["feed"].wake)
        return answer

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer ``{"error": "..."}``, or a page if a browser shows it to a person.

        There are no details unless the error was the client's.
        """
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Allow", ", ".join(self.verbs()))
        error = kwargs.get("exc_info", (None, None))[1]
        message = error.message if isinstance(error, Refused) else HTTPStatus(status_code).phrase
        if "text/html" in self.request.headers.get("Accept", ""):
            self.render("error.html", status=status_code, message=message)
        else:
            self.finish({"error": message})

    def verbs(self) -> list[str]:
        """The HTTP methods that this handler answers."""
        return [
            verb
            for verb in self.SUPPORTED_METHODS
            if getattr(type(self), verb.lower()) is not getattr(RequestHandler, verb.lower())
        ]


class NotFoundHandler(LedgerHandler):
    """Answers on paths that nobody else answers on."""

    def check_xsrf_cookie(self) -> None:
        """Nothing happens here that would need protection."""

    def prepare(self) -> None:
        """Answer 404, whatever the verb."""
        raise HTTPError(404)

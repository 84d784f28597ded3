"""What clients send, checked before it comes near the database."""

from __future__ import annotations

import json
import re
from typing import Any

from tornado.web import HTTPError

from example_app.models import MAX_INTEGER

DEFAULT_LIMIT = 50
MAX_LIMIT = 200


class Refused(HTTPError):
    """An error that is the client's to mend, with a message that says how.

    Tornado sends an ``HTTPError``'s message to the log only; this one is for
    the client, and `.LedgerHandler` puts it into the response.
    """

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(status_code)
        self.message = message


class Fields:
    """The fields of the JSON object in a request's body.

    Each is checked as it is taken. Raises `Refused` with status 400 for a body
    that is no JSON object, for a field that nobody asked for, and for a value
    of the wrong kind.
    """

    def __init__(self, body: bytes, *names: str) -> None:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
            raise Refused(400, "The body must be valid JSON.") from None
        if not isinstance(fields, dict):
            raise Refused(400, "The body must be a JSON object.")
        if not fields.keys() <= set(names):
            raise Refused(400, f"There is an unknown field; known are: {', '.join(names)}.")
        self._fields: dict[str, Any] = fields

    def integer(self, name: str, *, least: int, default: int | None = None) -> int:
        """A whole number from ``least`` up to what the database can hold."""
        value = self._take(name, default)
        # Not isinstance(): to Python, True is an integer.
        if type(value) is not int or not least <= value <= MAX_INTEGER:
            raise Refused(400, f"{name} must be an integer from {least} to {MAX_INTEGER}.")
        return value

    def text(self, name: str, *, longest: int, default: str | None = None) -> str:
        """Text of at most ``longest`` characters; not blank, unless that is the default."""
        value = self._take(name, default)
        if not isinstance(value, str) or len(value) > longest:
            raise Refused(400, f"{name} must be text of at most {longest} characters.")
        if not value.strip() and value != default:
            raise Refused(400, f"{name} must not be blank.")
        if not _storable(value):
            raise Refused(400, f"{name} must not contain NUL or half of a surrogate pair.")
        return value

    def currency(self, name: str) -> str:
        """An ISO 4217 code."""
        value = self._take(name, None)
        if not isinstance(value, str) or not re.fullmatch("[A-Z]{3}", value):
            raise Refused(400, f"{name} must be a currency code of three letters, such as EUR.")
        return value

    def _take(self, name: str, default: Any) -> Any:
        value = self._fields.get(name, default)
        if value is None and name not in self._fields:
            raise Refused(400, f"{name} is missing.")
        return value


def path_id(digits: str) -> int:
    """The id in a URL's path. Answers 404 for one that no row can have."""
    # The length first: Python refuses to read a number of thousands of digits.
    if len(digits) > len(str(MAX_INTEGER)) or int(digits) > MAX_INTEGER:
        raise HTTPError(404)
    return int(digits)


def row_limit(text: str) -> int:
    """How many rows a list may have, from the query argument of that name."""
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise Refused(400, f"limit must be an integer from 1 to {MAX_LIMIT}.")
    return int(text)


def _storable(text: str) -> bool:
    """False for what PostgreSQL refuses: NUL, and what cannot be written as UTF-8."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False

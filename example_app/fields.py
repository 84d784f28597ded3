"""What clients send, checked before it comes near the database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tornado.web import HTTPError

from example_app.errors import Refused
from example_app.models import MAX_KEY
from example_app.money import MAX_INTEGER

DEFAULT_LIMIT = 50
MAX_LIMIT = 200


class Fields:
    """The fields of the JSON object in a request's body.

    Each is checked as it is taken. Raises `.Refused` with status 400 for a body
    that is no JSON object, for a field that nobody asked for, and for a value
    of the wrong kind.
    """

    def __init__(self, body: bytes, *names: str) -> None:
        try:
            fields = json.loads(body, object_pairs_hook=_object)
        except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
            raise Refused(400, "The body must be valid JSON.") from None
        if not isinstance(fields, dict):
            raise Refused(400, "The body must be a JSON object.")
        if not fields.keys() <= set(names):
            raise Refused(400, f"There is an unknown field; known are: {', '.join(names)}.")
        self._fields: dict[str, Any] = fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def integer(self, name: str, *, least: int, default: int | None = None) -> int:
        """A whole number from ``least`` up to what the database can hold."""
        value = self._take(name, default)
        # Not isinstance(): to Python, True is an integer.
        if type(value) is not int or not least <= value <= MAX_INTEGER:
            raise Refused(400, f"{name} must be an integer from {least} to {MAX_INTEGER}.")
        return value

    def text(self, name: str, *, longest: int, default: str | None = None) -> str:
        """Text of at most ``longest`` characters; not blank, unless that is the default."""
        return text(name, self._take(name, default), longest=longest, default=default)

    def currency(self, name: str) -> str:
        """An ISO 4217 code."""
        return currency(name, self._take(name, None))

    def _take(self, name: str, default: Any) -> Any:
        value = self._fields.get(name, default)
        if value is None and name not in self._fields:
            raise Refused(400, f"{name} is missing.")
        return value


class Arguments:
    """The arguments of a query string, or of a form: text, each given once.

    Raises `.Refused` with status 400 for one that nobody asked for, and for one
    that is given twice.
    """

    def __init__(self, arguments: Mapping[str, Sequence[bytes]], *names: str) -> None:
        self._values: dict[str, str] = {}
        for name, values in arguments.items():
            if name not in names:
                raise Refused(400, f"There is an unknown argument; known are: {', '.join(names)}.")
            if len(values) > 1:
                raise Refused(400, f"{name} is given more than once.")
            try:
                self._values[name] = values[0].decode()
            except UnicodeDecodeError:
                raise Refused(400, f"{name} must be UTF-8.") from None

    def get(self, name: str) -> str:
        """The text as it came; empty if it did not come."""
        return self._values.get(name, "")

    def limit(self) -> int:
        """How many rows a list may have."""
        digits = self._values.get("limit", str(DEFAULT_LIMIT))
        if not re.fullmatch("[0-9]{1,3}", digits) or not 1 <= int(digits) <= MAX_LIMIT:
            raise Refused(400, f"limit must be an integer from 1 to {MAX_LIMIT}.")
        return int(digits)

    def ident(self, name: str) -> int | None:
        """An id, such as where a page of a list begins. None if it did not come."""
        digits = self._values.get(name)
        if digits is None:
            return None
        # The length first: Python refuses to read a number of thousands of digits.
        if not re.fullmatch("[0-9]{1,19}", digits) or not 1 <= int(digits) <= MAX_INTEGER:
            raise Refused(400, f"{name} must be an integer from 1 to {MAX_INTEGER}.")
        return int(digits)


def text(name: str, value: Any, *, longest: int, default: str | None = None) -> str:
    """``value`` if it is text, not too long, and not blank unless that is the default."""
    if not isinstance(value, str) or len(value) > longest:
        raise Refused(400, f"{name} must be text of at most {longest} characters.")
    if not value.strip() and value != default:
        raise Refused(400, f"{name} must not be blank.")
    if not _storable(value):
        raise Refused(400, f"{name} must not contain NUL or half of a surrogate pair.")
    return value


def currency(name: str, value: Any) -> str:
    """``value`` if it looks like an ISO 4217 code."""
    if not isinstance(value, str) or not re.fullmatch("[A-Z]{3}", value):
        raise Refused(400, f"{name} must be a currency code of three letters, such as EUR.")
    return value


def path_id(digits: str) -> int:
    """The id in a URL's path. Answers 404 for one that no row can have."""
    # The length first: Python refuses to read a number of thousands of digits.
    if len(digits) > len(str(MAX_INTEGER)) or int(digits) > MAX_INTEGER:
        raise HTTPError(404)
    return int(digits)


def idempotency_key(value: str | None) -> str | None:
    """The ``Idempotency-Key`` of a request, from its header or its form; None if there is none."""
    if value is None:
        return None
    if not re.fullmatch(rf"[!-~]{{1,{MAX_KEY}}}", value):
        raise Refused(
            400, f"Idempotency-Key must be 1 to {MAX_KEY} visible ASCII characters, without spaces."
        )
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")  # which of the two was meant?
    return fields


def _storable(text: str) -> bool:
    """False for what PostgreSQL refuses: NUL, and what cannot be written as UTF-8."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False

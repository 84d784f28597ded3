"""The description of the JSON API, for programs: OpenAPI 3.1, served at ``/openapi.json``.

What is said here is held against what the server does, with Schemathesis, in the tests.
"""

from __future__ import annotations

from typing import Any

from example_app.fields import DEFAULT_LIMIT, MAX_LIMIT
from example_app.models import MAX_KEY, MAX_MEMO, MAX_OWNER
from example_app.money import MAX_INTEGER

Schema = dict[str, Any]

# A NUL, which no database stores, and text that is all white space are refused.
_TEXT = r"^[^\u0000]*[^\u0000\s][^\u0000]*$"
_MEMO = r"^[^\u0000]*$"


def _integer(least: int, **more: Any) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": MAX_INTEGER, **more}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, schema: Schema, **headers: str) -> Schema:
    return {
        "description": description,
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        },
        "content": {"application/json": {"schema": schema}},
    }


def _errors(*codes: int) -> Schema:
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in (*codes, 503)}


def _body(name: str) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": _ref(name)}}}


def _query(name: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": _integer(1)}


def _page(name: str, item: str) -> Schema:
    return {
        "type": "object",
        "required": [name],
        "properties": {
            name: {"type": "array", "items": _ref(item), "maxItems": MAX_LIMIT},
            "next": {"type": "string", "description": "The next page; left out on the last one."},
        },
        "additionalProperties": False,
    }


_LIMIT = _query(
    "limit",
    {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    "How many rows at most.",
)
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": rf"^[!-~]{{1,{MAX_KEY}}}$"},
    "description": "A request with a key that came before gets the first answer again, and"
    " moves nothing. With another request, the answer is 422.",
}
_CURRENCY = {"type": "string", "pattern": "^[A-Z]{3}$", "description": "ISO 4217"}
_OWNER = {"type": "string", "minLength": 1, "maxLength": MAX_OWNER, "pattern": _TEXT}
_MONEY = "In the currency's minor unit: 1234 EUR is €12.34."
_MESSAGES = {
    400: "The request cannot be understood.",
    404: "There is no such thing.",
    409: "It was changed meanwhile: read it again.",
    415: "The body is not JSON by its Content-Type.",
    422: "The ledger's rules do not allow it.",
    503: "The database is busy or away; see Retry-After.",
}

_SCHEMAS: Schema = {
    "Account": _object(
        ["id", "owner", "currency", "balance", "limit", "version"],
        id=_integer(1),
        owner={"type": "string"},
        currency=_CURRENCY,
        balance=_integer(-MAX_INTEGER, description=_MONEY),
        limit=_integer(-MAX_INTEGER, description="The balance never goes below it."),
        version=_integer(1, description="Counts the changes of owner and limit."),
    ),
    "NewAccount": _object(
        ["owner", "currency"],
        owner=_OWNER,
        currency=_CURRENCY,
        balance=_integer(0, default=0, description=_MONEY),
        limit=_integer(-MAX_INTEGER, default=0),
    ),
    "AccountChange": _object(
        ["version"],
        version=_integer(1, description="As it was read; if it is not that any more: 409."),
        owner=_OWNER,
        limit=_integer(-MAX_INTEGER),
    ),
    "Transfer": _object(
        ["id", "from", "to", "amount", "memo", "created_at"],
        **{"id": _integer(1), "from": _integer(1), "to": _integer(1)},
        amount=_integer(1, description=_MONEY),
        memo={"type": "string"},
        created_at={"type": "string", "format": "date-time"},
    ),
    "NewTransfer": _object(
        ["from", "to", "amount"],
        **{"from": _integer(1), "to": _integer(1)},
        amount=_integer(1, description=_MONEY),
        memo={"type": "string", "maxLength": MAX_MEMO, "pattern": _MEMO, "default": ""},
    ),
    "Accounts": _page("accounts", "Account"),
    "Transfers": _page("transfers", "Transfer"),
    "Health": _object(
        ["status", "connections_out", "units_of_work"],
        status={"const": "ok"},
        connections_out=_integer(0),
        units_of_work=_integer(0),
    ),
    "Error": _object(["error"], error={"type": "string", "minLength": 1}),
}

#: The whole description.
DESCRIPTION: Schema = {
    "openapi": "3.1.0",
    "info": {
        "title": "Ledger",
        "version": "2",
        "description": "Accounts, and transfers between them. Money is conserved, and no balance"
        " goes below its account's limit. New transfers are told at the WebSocket /feed.",
    },
    "paths": {
        "/accounts": {
            "get": {
                "summary": "List accounts, oldest first",
                "operationId": "listAccounts",
                "parameters": [_LIMIT, _query("after", _integer(1), "From behind this id.")],
                "responses": {
                    "200": _json("A page.", _ref("Accounts"), Link="The next page, if any."),
                    **_errors(400),
                },
            },
            "post": {
                "summary": "Open an account",
                "operationId": "openAccount",
                "requestBody": _body("NewAccount"),
                "responses": {
                    "201": {
                        **_json("It is open.", _ref("Account"), Location="Its path."),
                        "links": {
                            "read": {
                                "operationId": "readAccount",
                                "parameters": {"id": "$response.body#/id"},
                            },
                            "change": {
                                "operationId": "changeAccount",
                                "parameters": {"id": "$response.body#/id"},
                            },
                        },
                    },
                    **_errors(400, 415, 422),
                },
            },
        },
        "/accounts/{id}": {
            "parameters": [_path("id")],
            "get": {
                "summary": "Read an account",
                "operationId": "readAccount",
                "responses": {"200": _json("The account.", _ref("Account")), **_errors(400, 404)},
            },
            "patch": {
                "summary": "Change an account's owner or limit",
                "operationId": "changeAccount",
                "requestBody": _body("AccountChange"),
                "responses": {
                    "200": _json("It is changed.", _ref("Account")),
                    **_errors(400, 404, 409, 415, 422),
                },
            },
        },
        "/transfers": {
            "get": {
                "summary": "List transfers, latest first",
                "operationId": "listTransfers",
                "parameters": [
                    _LIMIT,
                    _query("before", _integer(1), "From before this id."),
                    _query("account", _integer(1), "Of this account only."),
                ],
                "responses": {
                    "200": _json("A page.", _ref("Transfers"), Link="The next page, if any."),
                    **_errors(400),
                },
            },
            "post": {
                "summary": "Move money",
                "operationId": "transfer",
                "parameters": [_KEY],
                "requestBody": _body("NewTransfer"),
                "responses": {
                    "201": {
                        **_json("It has moved.", _ref("Transfer"), Location="The transfer's path."),
                        "links": {
                            "read": {
                                "operationId": "readTransfer",
                                "parameters": {"id": "$response.body#/id"},
                            }
                        },
                    },
                    **_errors(400, 415, 422),
                },
            },
        },
        "/transfers/{id}": {
            "parameters": [_path("id")],
            "get": {
                "summary": "Read a transfer",
                "operationId": "readTransfer",
                "responses": {"200": _json("The transfer.", _ref("Transfer")), **_errors(400, 404)},
            },
        },
        "/transfers.ndjson": {
            "get": {
                "summary": "Export all transfers, oldest first, one per line",
                "operationId": "exportTransfers",
                "responses": {
                    "200": {
                        "description": "As they stand when the request comes.",
                        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
                    },
                    **_errors(400),
                },
            }
        },
        "/healthz": {
            "get": {
                "summary": "Does the database answer?",
                "operationId": "health",
                "responses": {
                    "200": _json("Yes, and how busy this process is.", _ref("Health")),
                    **_errors(400),
                },
            }
        },
    },
    "components": {
        "schemas": _SCHEMAS,
        "responses": {
            str(code): _json(message, _ref("Error")) for code, message in _MESSAGES.items()
        },
    },
}

"""The API against its own description, ``/openapi.json``, by Schemathesis.

It runs as a command of its own: its plugin for pytest is nothing that other tests should meet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from example_app.app import make_app, open_database
from example_app.openapi import DESCRIPTION
from tests.example.support import off_the_books, serving
from tests.support import missing
from tornado_sa import Database

# What fits the schema can still be against the ledger's rules, such as an account that is not
# there; and JSON Schema takes 1.0 for an integer, which the ledger does not.
NOT_CHECKED = "positive_data_acceptance"


def test_every_path_of_the_api_is_described() -> None:
    db = open_database("sqlite://")
    routes = make_app(db).wildcard_router.rules
    patterns: list[Any] = [rule.matcher for rule in routes]
    handlers = {
        matcher._path.replace("%s", "{id}").replace("\\", ""): rule.target
        for matcher, rule in zip(patterns, routes, strict=True)
    }
    described = DESCRIPTION["paths"]
    tornados = {path for path in handlers if handlers[path].__module__.startswith("tornado")}
    for_people = {"/", "/ledger/{id}", "/open", "/pay", "/feed"} | tornados
    assert set(handlers) - set(described) - for_people == {"/openapi.json"}
    for path, verbs in described.items():
        assert {verb.upper() for verb in verbs if verb != "parameters"} == {
            verb
            for verb in ("GET", "POST", "PATCH", "PUT", "DELETE")
            if getattr(handlers[path], verb.lower()).__module__.startswith("example_app")
        }
    db.dispose()


@pytest.mark.parametrize("database_url", ["sqlite", "asyncpg"], indirect=True)
def test_the_api_keeps_to_its_description(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    """No 5xx, no answer that is not described, and whatever was sent, the books are right."""
    if find_spec("schemathesis") is None:
        missing("chromium", "no schemathesis; pip install -e '.[browser]'")
    with serving(tmp_path, "--database-url", database_url) as server:
        for _ in range(3):
            account = {"owner": "Ada", "currency": "EUR", "balance": 1000}
            assert server.post("/accounts", account) == 201
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                *("run", server.url + "/openapi.json", "--seed", "1", "--max-examples", "20"),
                *("--checks", "all", "--exclude-checks", NOT_CHECKED, "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert server.get("/healthz")["status"] == "ok"
        assert json.dumps(server.get("/openapi.json")) == json.dumps(DESCRIPTION)
        assert server.end() == 0
    with ledger.scope() as session:
        assert off_the_books(session) == []

"""What is said when something is wrong, and how the server says that it is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tornado.web import Application

from example_app.app import open_database
from tornado_sa import AsyncDatabase, Database

UNREACHABLE = "postgresql+psycopg://u:hunter2@127.0.0.1:9/x"
UNREACHABLE_ASYNC = "postgresql+asyncpg://u:hunter2@127.0.0.1:9/x"

on_sqlite = pytest.mark.parametrize("driver", ["sqlite"], indirect=True)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.gen_test
async def test_an_unknown_path_is_a_404(ask: Any, method: str) -> None:
    for path in ("/nothing", "/accounts/", "/accounts/1/x", "/%ff", "/%00"):
        assert await ask(method, path) == (404, {"error": "Not Found"}), path


@pytest.mark.gen_test
async def test_a_verb_that_a_path_does_not_have_is_a_405(ask: Any) -> None:
    for path in ("/", "/accounts", "/accounts/1", "/transfers", "/transfers/1"):
        assert await ask("DELETE", path) == (405, {"error": "Method Not Allowed"}), path


@pytest.mark.gen_test
async def test_a_405_says_what_there_is(fetch: Any) -> None:
    for path, verbs in [
        ("/", "GET"),
        ("/pay", "POST"),
        ("/accounts", "GET, POST"),
        ("/accounts/1", "GET, PATCH"),
        ("/healthz", "GET"),
    ]:
        assert (await fetch("PUT", path, "{}")).headers["Allow"] == verbs


@on_sqlite
@pytest.mark.gen_test
async def test_a_browser_gets_a_page(fetch: Any) -> None:
    response = await fetch("GET", "/nothing", headers={"Accept": "text/html,*/*"})
    assert response.code == 404
    assert response.headers["Content-Type"].startswith("text/html")
    assert b"<h1>404</h1>" in response.body and b"Not Found" in response.body


@on_sqlite
@pytest.mark.parametrize("path", ["/", "/accounts", "/nothing", "/openapi.json"])
@pytest.mark.gen_test
async def test_every_answer_says_what_a_browser_may_do_with_it(fetch: Any, path: str) -> None:
    headers = (await fetch("GET", path)).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize("path", ["/accounts", "/transfers"])
@pytest.mark.gen_test
async def test_what_a_form_could_send_is_a_415(ask: Any, path: str) -> None:
    """Another site's page can make a browser send these without asking, but no JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "json", ""):
        code, body = await ask("POST", path, "{}", Content_Type=kind)
        assert code == 415 and "application/json" in body["error"]


@on_sqlite
@pytest.mark.parametrize(
    "path", ["/accounts?limt=5", "/transfers?limit=1&limit=2", "/accounts/1?x=1", "/transfers?x"]
)
@pytest.mark.gen_test
async def test_a_misspelt_argument_is_not_ignored(ask: Any, path: str) -> None:
    code, body = await ask("GET", path)
    assert code == 400
    assert "unknown argument" in body["error"] or "more than once" in body["error"]


@on_sqlite
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.gen_test
async def test_an_error_of_ours_tells_no_details(
    app: Application, tmp_path: Path, ask: Any, expected_log: list[str], debug: bool
) -> None:
    app.settings["serve_traceback"] = debug
    app.settings["db"] = open_database(f"sqlite:///{tmp_path / 'without_tables.db'}")
    expected_log.append("Uncaught exception GET /accounts")
    assert await ask("GET", "/accounts") == (500, {"error": "Internal Server Error"})
    app.settings["db"].dispose()


@on_sqlite
@pytest.mark.parametrize("unreachable", [UNREACHABLE, UNREACHABLE_ASYNC])
@pytest.mark.parametrize("path", ["/accounts", "/healthz"])
@pytest.mark.gen_test
async def test_an_unreachable_database_is_a_503(
    app: Application, fetch: Any, expected_log: list[str], path: str, unreachable: str
) -> None:
    app.settings["db"] = open_database(unreachable)
    expected_log.append(f"GET {path}: 503 Service Unavailable")
    response = await fetch("GET", path)
    assert response.code == 503
    assert json.loads(response.body) == {"error": "Service Unavailable"}
    assert "Retry-After" in response.headers


@pytest.mark.gen_test
async def test_a_database_that_answers_is_healthy(ask: Any) -> None:
    quiet = {"status": "ok", "connections_out": 0, "units_of_work": 0}
    assert await ask("GET", "/healthz") == (200, quiet)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sqlite", Database),
        ("sqlite+aiosqlite", AsyncDatabase),
        ("postgresql+psycopg", Database),  # which SQLAlchemy also has an async variant of
        ("postgresql+psycopg_async", AsyncDatabase),
        ("postgresql+asyncpg", AsyncDatabase),
    ],
)
def test_the_driver_decides_on_the_kind_of_database(name: str, kind: type) -> None:
    assert type(open_database(f"{name}:///ledger")) is kind

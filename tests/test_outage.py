"""The database goes away and comes back; errors become responses. Rows 2 (in part), 19 and 20."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select, text
from tornado.web import HTTPError

from tests.cluster import Cluster
from tests.support import (
    DRIVERS,
    POSTGRESQL,
    Document,
    Flavour,
    Note,
    make_database,
    only,
    settle,
    until,
)


@only(*POSTGRESQL)
@pytest.mark.gen_test(timeout=60)
async def test_server_goes_down_and_comes_back(
    flavour: Flavour, serve: Any, cluster: Cluster, expected_log: list[str]
) -> None:
    url = cluster.url(DRIVERS[flavour.name]).render_as_string()
    db = make_database(flavour.name, url)

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            self.write(str(await settle(self.session.scalar(select(1)))))

    fetch = serve(Handler)
    assert (await fetch()).code == 200
    cluster.stop()
    expected_log += ["GET /: 503 Service Unavailable"] * 3
    for _ in range(3):  # the connection that was lost, and then the ones that are refused
        response = await fetch()
        assert response.code == 503
        assert response.headers["Retry-After"] == "1"
        assert b"SELECT" not in response.body
    cluster.start()
    assert (await fetch()).code == 200
    await settle(db.dispose())


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_server_kills_the_connection(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            await settle(self.session.flush())
            pid = await settle(self.session.scalar(select(func.pg_backend_pid())))
            with flavour.admin.connect() as connection:
                connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            await settle(self.session.scalar(select(1)))

        async def get(self) -> None:
            self.write(str(await settle(self.session.scalar(select(1)))))

    expected_log.append("POST /: 503 Service Unavailable")
    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 503
    await until(lambda: flavour.checked_out() == 0)
    assert (await fetch()).code == 200
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_nobody_listens(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    if "sqlite" in flavour.name:
        url = f"{DRIVERS[flavour.name]}:////no/such/folder/file.db"
    else:
        url = f"{DRIVERS[flavour.name]}://postgres:secret@127.0.0.1:9/postgres"
    db = make_database(flavour.name, url)

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            await settle(self.session.execute(select(1)))

        async def post(self) -> None:
            raise ConnectionRefusedError("of the handler's own")

        def write_error(self, status_code: int, **kwargs: Any) -> None:
            if self.get_query_argument("status", None):
                self.set_status(418)
            self.finish(kwargs["exc_info"][0].__name__)

    expected_log += ["GET /: 503 Service Unavailable", "Uncaught exception POST /"]
    fetch = serve(Handler)
    response = await fetch()
    assert response.code == 503
    assert response.body != b"HTTPError"  # write_error gets the original
    expected_log.append("GET /: 503 Service Unavailable")
    assert "Retry-After" not in (await fetch("/?status=418")).headers
    response = await fetch(method="POST")
    assert response.code == 500
    assert "Retry-After" not in response.headers
    with pytest.raises(Exception):  # noqa: B017  (each driver has its own)
        await settle(db.ping(timeout=2))
    await settle(db.dispose())


@only("aiosqlite", "asyncpg")
@pytest.mark.gen_test
async def test_exhausted_pool(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    db = make_database(flavour.name, url, engine_options=options)

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            await self.session.execute(select(1))

    expected_log.append("GET /: 503 Service Unavailable: TimeoutError: AsyncFairPool limit")
    fetch = serve(Handler)
    async with db.scope() as session:
        await session.execute(select(1))
        response = await fetch()
    assert (response.code, response.headers["Retry-After"]) == (503, "1")
    assert (await fetch()).code == 200
    await db.dispose()


@pytest.mark.gen_test
async def test_stale_data_is_a_conflict(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        async def put(self) -> None:
            document = await settle(self.session.get(Document, 1))
            await flavour.in_scope(change, commit=True)
            document.text = "mine"
            await settle(self.session.commit())

    async def change(session: Any) -> None:
        (await settle(session.get(Document, 1))).text = "theirs"

    def add(session: Any) -> None:
        session.add(Document(id=1, text="first"))

    await flavour.in_scope(add, commit=True)
    expected_log.append("PUT /: 409 Conflict: StaleDataError")
    assert (await serve(Handler)(method="PUT")).code == 409


@pytest.mark.parametrize("serves_traceback", [True, False])
@pytest.mark.gen_test
async def test_sql_never_reaches_a_client(
    flavour: Flavour, serve: Any, app: Any, expected_log: list[str], serves_traceback: bool
) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(text("SELECT secret FROM nowhere")))

    app.settings["serve_traceback"] = serves_traceback
    expected_log.append("Uncaught exception GET /")
    response = await serve(Handler)()
    assert response.code == 500
    assert (b"nowhere" in response.body) is serves_traceback


@pytest.mark.gen_test
async def test_http_errors_of_the_handler_stay_as_they_are(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            raise HTTPError(503)

    response = await serve(Handler)()
    assert response.code == 503
    assert "Retry-After" not in response.headers

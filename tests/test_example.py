"""The example application: its API, its page, and its command line, over sync and async drivers."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, make_url, select, text
from sqlalchemy.exc import IntegrityError
from tornado.httpclient import AsyncHTTPClient
from tornado.ioloop import IOLoop
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from example_app.app import create_schema, make_app, open_database
from example_app.models import MAX_INTEGER, Account, Base, Transfer, money
from example_app.server import DrainingServer
from tests.conftest import no_connection_thread
from tests.support import DRIVERS, RawClient, settle, until
from tornado_sa import AsyncDatabase, Database

UNREACHABLE = "postgresql+psycopg://u:hunter2@127.0.0.1:9/x"
UNREACHABLE_ASYNC = "postgresql+asyncpg://u:hunter2@127.0.0.1:9/x"


@pytest.fixture(params=["sqlite", "psycopg", "aiosqlite", "asyncpg"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a database without tables is. After the test it has none again."""
    driver = DRIVERS[request.param]
    if "sqlite" in driver:
        yield f"{driver}:///{tmp_path / 'ledger.db'}"
        return
    given = make_url(request.getfixturevalue("postgresql_url"))
    yield given.set(drivername=driver).render_as_string(hide_password=False)
    engine = create_engine(given.set(drivername="postgresql+psycopg"))
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def db(database_url: str, io_loop: IOLoop) -> Iterator[Database | AsyncDatabase]:
    """The application's database, with tables. After the test nothing is checked out or open."""
    db = open_database(database_url)
    io_loop.run_sync(lambda: create_schema(db))
    yield db

    async def end() -> None:
        if isinstance(db, AsyncDatabase):  # its closings may take a moment
            await until(lambda: db.status().checked_out == 0 and not db.status().open_scopes)
        status = db.status()
        assert (status.checked_out, status.open_scopes) == (0, [])
        await settle(db.dispose())
        await until(no_connection_thread)

    io_loop.run_sync(end)


@pytest.fixture
def ledger(db: Database | AsyncDatabase, database_url: str) -> Iterator[Database]:
    """A `Database` of the test's own, on the application's tables, which are empty."""
    driver = "sqlite" if "sqlite" in database_url else "postgresql+psycopg"
    ledger = Database(make_url(database_url).set(drivername=driver))
    yield ledger
    ledger.dispose()


@pytest.fixture
def app(db: Database | AsyncDatabase) -> Application:
    return make_app(db)


@pytest.fixture
def ask(app: Application, http_client: AsyncHTTPClient, base_url: str) -> Any:
    """``code, body = await ask("POST", "/accounts", {...})``; text is sent as it is."""

    async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        if body is not None and not isinstance(body, str | bytes):
            body = json.dumps(body)
        response = await http_client.fetch(
            base_url + path, method=method, body=body, raise_error=False
        )
        assert b"SELECT" not in response.body and b"INSERT" not in response.body
        return response.code, json.loads(response.body)

    return ask


def rows(ledger: Database) -> tuple[int, int]:
    """How many accounts there are, and how many transfers."""
    with ledger.scope() as session:
        accounts = session.scalar(select(func.count()).select_from(Account)) or 0
        transfers = session.scalar(select(func.count()).select_from(Transfer)) or 0
        return accounts, transfers


def balances(ledger: Database) -> list[int]:
    with ledger.scope() as session:
        return list(session.scalars(select(Account.balance).order_by(Account.id)))


def open_accounts(ledger: Database, *opening: int, currency: str = "EUR") -> list[int]:
    """Open an account for each balance; return their ids."""
    with ledger.begin() as session:
        accounts = [Account(owner="Ada", currency=currency, balance=money) for money in opening]
        session.add_all(accounts)
        session.flush()
        return [account.id for account in accounts]


# -- accounts ------------------------------------------------------------------


@pytest.mark.gen_test
async def test_an_account_is_opened_listed_and_read(
    http_client: Any, base_url: str, ask: Any
) -> None:
    body = json.dumps({"owner": "Ada", "currency": "EUR", "balance": 100})
    created = await http_client.fetch(base_url + "/accounts", method="POST", body=body)
    assert created.code == 201
    account = json.loads(created.body)
    assert created.headers["Location"] == f"/accounts/{account['id']}"
    assert account == {"id": account["id"], "owner": "Ada", "currency": "EUR", "balance": 100}
    assert await ask("GET", created.headers["Location"]) == (200, account)
    assert await ask("GET", "/accounts") == (200, {"accounts": [account]})


@pytest.mark.gen_test
async def test_an_account_opens_empty_unless_told_otherwise(ask: Any) -> None:
    code, account = await ask("POST", "/accounts", {"owner": "Зоя 🦊", "currency": "JPY"})
    assert (code, account["owner"], account["balance"]) == (201, "Зоя 🦊", 0)


@pytest.mark.gen_test
async def test_the_largest_values_fit(ledger: Database, ask: Any) -> None:
    whole = {"owner": "x" * 100, "currency": "EUR", "balance": MAX_INTEGER}
    code, account = await ask("POST", "/accounts", whole)
    assert (code, account["balance"]) == (201, MAX_INTEGER)
    (other,) = open_accounts(ledger, 0)
    order = {"from": account["id"], "to": other, "amount": MAX_INTEGER, "memo": "x" * 200}
    assert (await ask("POST", "/transfers", order))[0] == 201
    assert balances(ledger) == [0, MAX_INTEGER]


BAD_ACCOUNTS: list[tuple[str, list[Any]]] = [
    ("owner", [None, 1, True, "", " ", "x" * 101, "a\0b", "\ud800", ["Ada"], {}]),
    ("currency", [None, 978, "eur", "EURO", "EU", "EUR\n", "ÄÖÜ", "٣٣٣", "\0\0\0"]),
    ("balance", [None, -1, True, 1.0, 1e400, "1", 2**63, 10**400, [1]]),
    ("colour", ["red"]),
    ("id", [1]),
]


@pytest.mark.parametrize(("field", "values"), BAD_ACCOUNTS)
@pytest.mark.gen_test
async def test_a_bad_account_is_refused(
    ledger: Database, ask: Any, field: str, values: list[Any]
) -> None:
    good = {"owner": "Ada", "currency": "EUR", "balance": 1}
    for value in values:
        code, body = await ask("POST", "/accounts", {**good, field: value})
        assert code == 400, value
        assert field in body["error"] or "unknown field" in body["error"]
    assert rows(ledger) == (0, 0)


BAD_BODIES: list[str | bytes] = ["", "{", "{}", "[]", "null", "1", '"x"', "a=b", "[" * 50_000]
BAD_BODIES += ['{"balance": %s}' % ("9" * 5000), b"\xff\xfe", b'{"owner": "\xff"}']


@pytest.mark.parametrize("path", ["/accounts", "/transfers"])
@pytest.mark.gen_test
async def test_a_bad_body_is_refused(ledger: Database, ask: Any, path: str) -> None:
    for body in BAD_BODIES:
        code, answer = await ask("POST", path, body)
        assert (code, list(answer)) == (400, ["error"]), body
    assert rows(ledger) == (0, 0)


@pytest.mark.gen_test
async def test_a_missing_field_is_named(ask: Any) -> None:
    assert await ask("POST", "/accounts", {"owner": "Ada"}) == (
        400,
        {"error": "currency is missing."},
    )


@pytest.mark.parametrize("path", ["/accounts/", "/transfers/"])
@pytest.mark.gen_test
async def test_an_id_that_no_row_has_is_a_404(ask: Any, path: str) -> None:
    for ident in ("1", "0", "007", str(MAX_INTEGER), str(2**63), "9" * 5000, "x", "-1", "%00"):
        assert await ask("GET", path + ident) == (404, {"error": "Not Found"}), ident


@pytest.mark.gen_test
async def test_lists_are_limited(ledger: Database, ask: Any) -> None:
    first, second = open_accounts(ledger, *[1000] * 201)[:2]
    with ledger.begin() as session:
        for amount in range(1, 61):
            session.add(Transfer(from_id=first, to_id=second, amount=amount, memo=""))
    for path in ("/accounts", "/transfers"):
        listed = (await ask("GET", path))[1][path[1:]]
        assert len(listed) == 50
    assert len((await ask("GET", "/accounts?limit=200"))[1]["accounts"]) == 200
    latest = (await ask("GET", "/transfers?limit=2"))[1]["transfers"]
    assert [transfer["amount"] for transfer in latest] == [60, 59]


@pytest.mark.parametrize("path", ["/", "/accounts", "/transfers"])
@pytest.mark.gen_test
async def test_a_bad_limit_is_refused(ask: Any, path: str) -> None:
    for limit in ("0", "201", "-1", "x", "", "1.0", "9" * 5000, "%D9%A3", "%00"):
        code, body = await ask("GET", f"{path}?limit={limit}")
        assert (code, body) == (400, {"error": "limit must be an integer from 1 to 200."})


# -- transfers -----------------------------------------------------------------


@pytest.mark.gen_test
async def test_a_transfer_moves_money_and_is_read(ledger: Database, ask: Any) -> None:
    first, second = open_accounts(ledger, 100, 5)
    order = {"from": first, "to": second, "amount": 30, "memo": "lunch"}
    code, transfer = await ask("POST", "/transfers", order)
    assert code == 201
    assert transfer.items() >= order.items()
    assert transfer["created_at"].endswith("+00:00")
    assert balances(ledger) == [70, 35]
    assert await ask("GET", f"/transfers/{transfer['id']}") == (200, transfer)
    assert await ask("GET", "/transfers") == (200, {"transfers": [transfer]})


@pytest.mark.parametrize(
    ("source", "target", "amount", "error"),
    [
        ("ada", "bob", 101, "insufficient funds"),
        ("bob", "ada", 1, "insufficient funds"),
        ("ada", "ada", 1, "same account"),
        ("ada", "yen", 1, "different currencies"),
        ("ada", "nobody", 1, "no account"),
        ("nobody", "ada", 1, "no account"),
        ("ada", "full", 1, "cannot hold"),
    ],
)
@pytest.mark.gen_test
async def test_the_ledger_refuses_what_would_not_add_up(
    ledger: Database, ask: Any, source: str, target: str, amount: int, error: str
) -> None:
    ada, bob, full = open_accounts(ledger, 100, 0, MAX_INTEGER)
    (yen,) = open_accounts(ledger, 100, currency="JPY")
    ids = {"ada": ada, "bob": bob, "full": full, "yen": yen, "nobody": MAX_INTEGER}
    order = {"from": ids[source], "to": ids[target], "amount": amount}
    code, body = await ask("POST", "/transfers", order)
    assert code == 422
    assert error in body["error"]
    assert balances(ledger) == [100, 0, MAX_INTEGER, 100]
    assert rows(ledger) == (4, 0)


BAD_TRANSFERS: list[tuple[str, list[Any]]] = [
    ("from", [None, "1", True, 1.0, 0, -1, 2**63]),
    ("to", [None, "1", True, 1.0, 0, -1, 2**63]),
    ("amount", [None, "1", True, 1.5, 0, -1, 2**63, 10**400]),
    ("memo", [None, 1, "x" * 201, "a\0b", "\udfff", []]),
    ("created_at", ["now"]),
]


@pytest.mark.parametrize(("field", "values"), BAD_TRANSFERS)
@pytest.mark.gen_test
async def test_a_bad_transfer_is_refused(
    ledger: Database, ask: Any, field: str, values: list[Any]
) -> None:
    first, second = open_accounts(ledger, 100, 100)
    good = {"from": first, "to": second, "amount": 1, "memo": ""}
    for value in values:
        code, body = await ask("POST", "/transfers", {**good, field: value})
        assert code == 400, value
        assert field in body["error"] or "unknown field" in body["error"]
    assert (balances(ledger), rows(ledger)) == ([100, 100], (2, 0))


@pytest.mark.gen_test
async def test_concurrent_transfers_conserve_money(ledger: Database, ask: Any) -> None:
    """In both directions at once, and more than the accounts can pay."""
    first, second = open_accounts(ledger, 100, 100)
    orders = [{"from": first, "to": second, "amount": 30}] * 25
    orders += [{"from": second, "to": first, "amount": 7}] * 25
    answers = await asyncio.gather(*(ask("POST", "/transfers", order) for order in orders))
    assert {code for code, _ in answers} == {201, 422}
    assert sum(balances(ledger)) == 200
    assert min(balances(ledger)) >= 0
    assert rows(ledger) == (2, [code for code, _ in answers].count(201))


@pytest.mark.gen_test
async def test_a_transfer_needs_its_accounts(db: Database | AsyncDatabase) -> None:
    """The database checks as well, SQLite too."""
    transfer = Transfer(from_id=1, to_id=2, amount=1, memo="")
    with pytest.raises(IntegrityError):
        if isinstance(db, AsyncDatabase):
            async with db.begin() as async_session:
                async_session.add(transfer)
        else:
            with db.begin() as session:
                session.add(transfer)


# -- errors and the page -------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.gen_test
async def test_an_unknown_path_is_a_404(ask: Any, method: str) -> None:
    for path in ("/nothing", "/accounts/", "/accounts/1/x", "/%ff", "/%00"):
        assert await ask(method, path) == (404, {"error": "Not Found"}), path


@pytest.mark.gen_test
async def test_a_verb_that_a_path_does_not_have_is_a_405(ask: Any) -> None:
    for path in ("/", "/accounts", "/accounts/1", "/transfers", "/transfers/1"):
        assert await ask("DELETE", path) == (405, {"error": "Method Not Allowed"}), path


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.gen_test
async def test_an_error_of_ours_tells_no_details(
    app: Application, ledger: Database, ask: Any, expected_log: list[str], debug: bool
) -> None:
    app.settings["serve_traceback"] = debug
    Base.metadata.drop_all(ledger.engine)
    expected_log.append("Uncaught exception GET /accounts")
    assert await ask("GET", "/accounts") == (500, {"error": "Internal Server Error"})


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("unreachable", [UNREACHABLE, UNREACHABLE_ASYNC])
@pytest.mark.gen_test
async def test_an_unreachable_database_is_a_503(
    app: Application, http_client: Any, base_url: str, expected_log: list[str], unreachable: str
) -> None:
    app.settings["db"] = open_database(unreachable)
    expected_log.append("GET /accounts: 503 Service Unavailable")
    response = await http_client.fetch(base_url + "/accounts", raise_error=False)
    assert response.code == 503
    assert json.loads(response.body) == {"error": "Service Unavailable"}
    assert "Retry-After" in response.headers


@pytest.mark.gen_test
async def test_the_page_shows_accounts_and_transfers(
    ledger: Database, http_client: Any, base_url: str
) -> None:
    with ledger.begin() as session:
        ada = Account(owner="<script>Ada", currency="EUR", balance=123456)
        bob = Account(owner="Bob", currency="EUR", balance=0)
        session.add(Transfer(source=ada, target=bob, amount=5, memo="<b>&"))
    response = await http_client.fetch(base_url + "/")
    page = response.body.decode()
    assert response.headers["Content-Type"].startswith("text/html")
    assert "&lt;script&gt;Ada" in page and "<script>" not in page
    assert "1,234.56 EUR" in page and "0.05 EUR" in page and "&lt;b&gt;&amp;" in page


@pytest.mark.gen_test
async def test_the_page_of_an_empty_ledger(
    app: Application, http_client: Any, base_url: str
) -> None:
    assert (await http_client.fetch(base_url + "/")).body.count(b"None yet") == 2


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        (0, "EUR", "0.00 EUR"),
        (5, "EUR", "0.05 EUR"),
        (123456, "JPY", "123,456 JPY"),
        (1, "KWD", "0.001 KWD"),
        (MAX_INTEGER, "USD", "92,233,720,368,547,758.07 USD"),
    ],
)
def test_money_for_people(amount: int, currency: str, shown: str) -> None:
    assert money(amount, currency) == shown


@pytest.mark.parametrize(
    ("driver", "kind"),
    [
        ("sqlite", Database),
        ("sqlite+aiosqlite", AsyncDatabase),
        ("postgresql+psycopg", Database),  # which SQLAlchemy also has an async variant of
        ("postgresql+psycopg_async", AsyncDatabase),
        ("postgresql+asyncpg", AsyncDatabase),
    ],
)
def test_the_driver_decides_on_the_kind_of_database(driver: str, kind: type) -> None:
    assert type(open_database(f"{driver}:///ledger")) is kind


# -- the end of the server -----------------------------------------------------


class Waiting(RequestHandler):
    """Answers when ``release`` is set."""

    def initialize(self, arrived: list[Any], release: asyncio.Event) -> None:
        self.arrived, self.release = arrived, release

    async def get(self) -> None:
        self.arrived.append(asyncio.current_task())
        await self.release.wait()
        self.write("done")


class Draining:
    """A `DrainingServer` with requests that wait, and connections that send them."""

    def __init__(self) -> None:
        self.arrived: list[Any] = []
        self.release = asyncio.Event()
        arguments = {"arrived": self.arrived, "release": self.release}
        self.server = DrainingServer(Application([(r"/", Waiting, arguments)]))
        sock, self.port = bind_unused_port()
        self.server.add_socket(sock)

    async def send(self, client: RawClient) -> None:
        """Send a request, and wait until its handler runs."""
        already = len(self.arrived)
        await client.send("GET / HTTP/1.1\nHost: x")
        await until(lambda: len(self.arrived) > already)


@pytest.mark.gen_test
async def test_drain_cuts_off_a_request_that_takes_too_long(expected_log: list[str]) -> None:
    draining = Draining()
    async with RawClient(f"http://127.0.0.1:{draining.port}") as client:
        await draining.send(client)
        expected_log.append("Cut off after 0.05 s: 1 unanswered requests")
        await draining.server.drain(0.05)
        assert await client.reader.read() == b""
    draining.release.set()
    await asyncio.wait(draining.arrived)


@pytest.mark.gen_test
async def test_drain_answers_a_late_request_as_the_last_of_its_connection() -> None:
    draining = Draining()
    url = f"http://127.0.0.1:{draining.port}"
    async with RawClient(url) as first, RawClient(url) as second:
        await draining.send(first)
        drained = asyncio.ensure_future(draining.server.drain(5))
        await asyncio.sleep(0)
        await draining.send(second)
        draining.release.set()
        assert (await first.reader.read()).endswith(b"done")
        answer = await second.reader.read()
        assert answer.endswith(b"done") and b"Connection: close" in answer
        await drained


# -- the command line ----------------------------------------------------------


class Server:
    """``python -m example_app`` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / f"stderr-{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                **command(folder, "--port", "0", *arguments), stderr=log
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.fullmatch(
            r"Ledger on (http://127\.0\.0\.1:(\d+)) \(Ctrl-C ends it\)\n", self.line
        )
        assert found, self.line + self.log.read_text()
        self.url, self.port = found[1], int(found[2])

    def post(self, path: str, body: Any) -> int:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(signum)
        return self.process.wait(timeout=8)


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """What ``subprocess`` needs to run the command line in ``folder``."""
    return {
        "args": [sys.executable, "-m", "example_app", *arguments],
        "cwd": folder,
        "env": {"PYTHONPATH": str(Path(__file__).parents[1])},
        "stdout": subprocess.PIPE,
        "text": True,
    }


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        **command(folder, *arguments), stderr=subprocess.PIPE, timeout=20, check=False
    )


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
    assert "Traceback" not in server.log.read_text()


def refused(folder: Path, *arguments: str) -> str:
    """Start a server that cannot start; return the one line it says."""
    done = run(folder, "--port", "0", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "hunter2" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("driver", "signum"),
    [
        ("sqlite", signal.SIGTERM),
        ("sqlite", signal.SIGINT),
        ("sqlite+aiosqlite", signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_server(tmp_path: Path, driver: str, signum: int) -> None:
    with serving(tmp_path, "--database-url", f"{driver}:///ledger.db") as server:
        assert server.post("/accounts", {"owner": "Ada", "currency": "EUR"}) == 201
        assert server.end(signum) == 0
    assert (tmp_path / "ledger.db").exists()


def test_the_ledger_is_there_again_after_a_restart(tmp_path: Path) -> None:
    """Whichever driver comes next."""
    for expected, driver in (1, "sqlite+aiosqlite"), (2, "sqlite"):
        with serving(tmp_path, "--database-url", f"{driver}:///ledger.db") as server:
            server.post("/accounts", {"owner": "Ada", "currency": "EUR"})
            with urllib.request.urlopen(server.url + "/accounts") as response:
                assert len(json.load(response)["accounts"]) == expected
            assert server.end() == 0


@pytest.mark.parametrize("database_url", ["psycopg", "asyncpg"], indirect=True)
def test_the_server_runs_on_postgresql(tmp_path: Path, ledger: Database, database_url: str) -> None:
    with serving(tmp_path, "--database-url", database_url) as server:
        assert server.post("/accounts", {"owner": "Ada", "currency": "EUR"}) == 201
        assert server.end() == 0
    assert rows(ledger) == (1, 0)
    assert not (tmp_path / "ledger.db").exists()


def test_debug_shows_the_log(tmp_path: Path) -> None:
    with serving(tmp_path, "--debug") as server:
        assert server.post("/nothing", {}) == 404
        assert server.end() == 0
        assert " DEBUG " in server.log.read_text()


def test_an_idle_connection_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port)
        client.request("GET", "/accounts")
        client.getresponse().read()
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 3
        client.close()


def test_a_request_in_flight_is_answered_before_the_end(tmp_path: Path) -> None:
    body = b'{"owner": "Ada", "currency": "EUR"}'
    head = (
        "POST /accounts HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with serving(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=8) as client:
            client.sendall(head.encode() + body[:10])
            assert b"100" in client.recv(1000)  # the server has the head, and waits for the body
            server.process.send_signal(signal.SIGTERM)
            wait_until_refused(server.port)
            client.sendall(body[10:])
            assert client.recv(1000).startswith(b"HTTP/1.1 201 ")
        assert server.process.wait(timeout=8) == 0


@contextmanager
def transfer_that_waits(ledger: Database, server: Server, ids: list[int]) -> Iterator[Future[int]]:
    """Keep a transfer of 1, from the second account to the first, waiting for the first."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    order = {"from": ids[1], "to": ids[0], "amount": 1}
    with (
        ThreadPoolExecutor() as pool,
        ledger.scope() as session,
        ledger.engine.connect() as connection,
    ):
        session.get(Account, ids[0], with_for_update=True)
        answer = pool.submit(server.post, "/transfers", order)
        while not (connection.scalar(waiting) or answer.done()):
            time.sleep(0.01)
        yield answer
        session.rollback()
        answer.result()


@pytest.mark.parametrize("database_url", ["psycopg", "asyncpg"], indirect=True)
def test_a_transfer_that_waits_for_a_lock_is_answered_before_the_end(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    ids = open_accounts(ledger, 0, 100)
    with serving(tmp_path, "--database-url", database_url) as server:
        with transfer_that_waits(ledger, server, ids) as answer:
            server.process.send_signal(signal.SIGTERM)
        assert answer.result() == 201
        assert server.process.wait(timeout=8) == 0
    assert balances(ledger) == [1, 99]


@pytest.mark.parametrize("database_url", ["asyncpg"], indirect=True)
def test_over_an_async_driver_a_transfer_that_waits_holds_up_nobody(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    ids = open_accounts(ledger, 0, 100)
    with serving(tmp_path, "--database-url", database_url) as server:
        with transfer_that_waits(ledger, server, ids) as answer:
            with urllib.request.urlopen(server.url + "/accounts", timeout=8) as response:
                assert len(json.load(response)["accounts"]) == 2
            assert not answer.done()
        assert answer.result() == 201
        assert server.end() == 0


@pytest.mark.parametrize("database_url", ["psycopg"], indirect=True)
def test_accounts_are_locked_in_the_order_of_their_ids(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    """Or two transfers in opposite directions could each hold what the other waits for."""
    ids = open_accounts(ledger, 0, 100)
    with serving(tmp_path, "--database-url", database_url) as server:
        with transfer_that_waits(ledger, server, ids) as answer, ledger.scope() as session:
            session.get(Account, ids[1], with_for_update={"nowait": True})
            session.rollback()
        assert answer.result() == 201


def wait_until_refused(port: int) -> None:
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionError:
            return
        time.sleep(0.01)
    pytest.fail("the server still accepts connections")


def test_servers_that_share_a_database_conserve_money(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    """Each of three processes moves money both ways, between the same two accounts."""
    first, second = open_accounts(ledger, 100, 100)
    orders = [{"from": first, "to": second, "amount": 30}] * 25
    orders += [{"from": second, "to": first, "amount": 7}] * 25
    arguments = ("--database-url", database_url)
    with (
        serving(tmp_path, *arguments) as one,
        serving(tmp_path, *arguments) as two,
        serving(tmp_path, *arguments) as three,
        ThreadPoolExecutor(12) as pool,
    ):
        servers = [one, two, three] * 17
        codes = list(pool.map(lambda s, o: s.post("/transfers", o), servers, orders))
        assert [server.end() for server in (one, two, three)] == [0, 0, 0]
    assert set(codes) == {201, 422}
    assert (sum(balances(ledger)), min(balances(ledger)) >= 0) == (200, True)
    assert rows(ledger) == (2, codes.count(201))


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    sock, port = bind_unused_port()
    assert f"127.0.0.1:{port}" in refused(tmp_path, "--port", str(port))
    sock.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (UNREACHABLE, "Connection refused"),
        ("postgresql+psycopg://127.0.0.1:9/x?password=hunter2", "Connection refused"),
        ("sqlite:////no/such/folder/ledger.db", "unable to open database file"),
        ("sqlite:////proc/ledger.db", "unable to open database file"),
        ("sqlite:////", "unable to open database file"),
        ("sqlite:///ledger.db?timeout=soon", "soon"),
        ("nonsense hunter2", "cannot be parsed"),
        ("", "cannot be parsed"),
        ("nosuch://u:hunter2@h/x", "knows no driver"),
        (UNREACHABLE_ASYNC, "Connect call failed"),
        ("postgresql+asyncpg://127.0.0.1:9/x?sslmode=require", "sslmode"),
        ("postgresql+asyncpg://u:hunter2@h:hunter2/x", "cannot be parsed"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path, url: str, said: str) -> None:
    assert said in refused(tmp_path, "--database-url", url)


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_a_file_that_is_no_database_is_one_line(tmp_path: Path, driver: str) -> None:
    (tmp_path / "ledger.db").write_text("something else, which must not be overwritten" * 100)
    assert "not a database" in refused(tmp_path, "--database-url", f"{driver}:///ledger.db")


def test_a_database_that_can_only_be_read_is_one_line(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    if "sqlite" in database_url:
        url = make_url(database_url).set(database=f"file:{tmp_path}/ledger.db")
        read_only = url.set(query={"mode": "ro", "uri": "true"}).render_as_string()
        assert "readonly database" in refused(tmp_path, "--database-url", read_only)
        return
    # The connections that are open already do not notice.
    name = make_url(database_url).database
    with ledger.begin() as session:
        session.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    try:
        assert "read-only transaction" in refused(tmp_path, "--database-url", database_url)
    finally:
        with ledger.begin() as session:
            session.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))


@pytest.mark.parametrize("port", ["x", "-1", "65536", "1.5", ""])
def test_a_bad_port_number_is_a_usage_error(tmp_path: Path, port: str) -> None:
    done = run(tmp_path, f"--port={port}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid port value" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_option(tmp_path: Path) -> None:
    out = run(tmp_path, "--help").stdout
    assert all(option in out for option in ("--port", "--database-url", "--debug", "8888"))

"""The command line: how servers start, share the work, and end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from tornado.testing import bind_unused_port

from example_app.models import Account
from tests.conftest import MARIADB_URL
from tests.example.support import (
    Server,
    add_accounts,
    count_rows,
    list_balances,
    off_the_books,
    refused,
    run,
    serving,
)
from tests.support import missing
from tornado_sa import Database

T = TypeVar("T")

UNREACHABLE = "postgresql+psycopg://u:hunter2@127.0.0.1:9/x"
UNREACHABLE_ASYNC = "postgresql+asyncpg://u:hunter2@127.0.0.1:9/x"


def in_books(ledger: Database, function: Callable[[Session], T]) -> T:
    with ledger.scope(read_only=True) as session:
        return function(session)


def open_accounts(ledger: Database, *opening: int) -> list[int]:
    with ledger.begin() as session:
        ids: list[int] = add_accounts(session, *opening)
        return ids


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
    assert in_books(ledger, count_rows) == (1, 0)
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
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
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
        ledger.reader.connect() as connection,  # a transaction would see pg_stat_activity once
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
    assert in_books(ledger, list_balances) == [1, 99]


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


@pytest.mark.parametrize("database_url", ["sqlite", "asyncpg"], indirect=True)
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
    assert (sum(in_books(ledger, list_balances)), min(in_books(ledger, list_balances)) >= 0) == (
        200,
        True,
    )
    assert in_books(ledger, count_rows) == (2, codes.count(201))
    assert in_books(ledger, off_the_books) == []


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
    assert all(
        option in out for option in ("--port", "--database-url", "--processes", "--debug", "8888")
    )


# -- several processes ---------------------------------------------------------


def children(server: Server) -> list[int]:
    """The two processes that serve, once they are there."""
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    wait_until(lambda: len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def alive(pid: int) -> bool:
    """True if the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("not so after 10 s")


@pytest.mark.parametrize("database_url", ["aiosqlite", "psycopg"], indirect=True)
def test_processes_share_the_work(tmp_path: Path, ledger: Database, database_url: str) -> None:
    """And conserve money, and end all together, each in good order."""
    first, second = open_accounts(ledger, 100, 100)
    orders = [{"from": first, "to": second, "amount": 30}] * 20
    orders += [{"from": second, "to": first, "amount": 7}] * 20
    with serving(tmp_path, "--processes", "2", "--database-url", database_url) as server:
        pids = children(server)
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(lambda order: server.post("/transfers", order), orders))
        assert server.end() == 0
        assert not any(alive(pid) for pid in pids)
    assert set(codes) == {201, 422}
    assert sum(in_books(ledger, list_balances)) == 200
    assert in_books(ledger, count_rows) == (2, codes.count(201))
    assert in_books(ledger, off_the_books) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_request_in_flight_is_answered_by_every_process(
    tmp_path: Path, signum: signal.Signals
) -> None:
    body = b'{"owner": "Ada", "currency": "EUR"}'
    head = (
        "POST /accounts HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with serving(tmp_path, "--processes", "2") as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=8) for _ in "123"]
        for client in clients:
            client.sendall(head.encode())
            assert b"100" in client.recv(1000)
        server.process.send_signal(signum)
        wait_until_refused(server.port)
        for client in clients:
            client.sendall(body)
            assert client.recv(1000).startswith(b"HTTP/1.1 201 ")
            client.close()
        assert server.process.wait(timeout=8) == 0


def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, "--processes", "2") as server:
        killed = children(server)[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in children(server))
        for _ in range(10):
            assert server.get("/healthz")["status"] == "ok"
        assert server.end() == 0
        assert "has ended by itself" in server.log.read_text()


def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    with serving(tmp_path, "--processes", "2") as server:
        pids = children(server)
        server.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite://"])
def test_several_processes_cannot_share_memory(tmp_path: Path, url: str) -> None:
    said = refused(tmp_path, "--processes", "2", "--database-url", url)
    assert "SQLite in memory" in said and "sqlite:///ledger.db" in said


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_one_process_can_keep_its_books_in_memory(tmp_path: Path, url: str) -> None:
    with serving(tmp_path, "--database-url", url) as server:
        assert server.post("/accounts", {"owner": "Ada", "currency": "EUR"}) == 201
        assert len(server.get("/accounts")["accounts"]) == 1
        assert server.end() == 0


def test_a_bad_number_of_processes_is_a_usage_error(tmp_path: Path) -> None:
    for number in ("0", "x"):
        done = run(tmp_path, "--processes", number)
        assert (done.returncode, done.stdout) == (2, "")
        assert "invalid process_count value" in done.stderr


def test_an_open_feed_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Whoever listens is told: 1001, going away."""
    with serving(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=8) as client:
            client.sendall(
                b"GET /feed HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            assert client.recv(4000).startswith(b"HTTP/1.1 101 ")
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            frame = client.recv(4000)
            assert frame[0] == 0x88 and int.from_bytes(frame[2:4], "big") == 1001
            client.sendall(b"\x88\x82\0\0\0\0" + frame[2:4])
            assert server.process.wait(timeout=8) == 0
            assert time.monotonic() - started < 3


@pytest.mark.parametrize("driver", ["mariadb+pymysql", "mariadb+aiomysql"])
def test_the_server_runs_on_mariadb(tmp_path: Path, driver: str) -> None:
    name = f"ledger_{time.time_ns()}"
    admin = create_engine(make_url(MARIADB_URL).set(drivername="mariadb+pymysql"))
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        missing("mariadb", error)
    url = admin.url.set(drivername=driver, database=name).render_as_string(hide_password=False)
    try:
        with serving(tmp_path, "--processes", "2", "--database-url", url) as server:
            for balance in 100, 0:
                account = {"owner": "Ada 🦊", "currency": "EUR", "balance": balance}
                assert server.post("/accounts", account) == 201
            order = {"from": 1, "to": 2, "amount": 30}
            with ThreadPoolExecutor(8) as pool:
                same = {"Idempotency-Key": "one"}
                codes = list(pool.map(lambda _: server.post("/transfers", order, same), range(8)))
            assert codes == [201] * 8
            assert server.post("/transfers", order, {"Idempotency-Key": "ONE"}) == 201
            accounts = server.get("/accounts")["accounts"]
            assert [account["balance"] for account in accounts] == [40, 60]
            assert len(server.get("/transfers")["transfers"]) == 2
            assert server.end() == 0
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}"))
        admin.dispose()

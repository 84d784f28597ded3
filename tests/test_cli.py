"""``python -m tornado_sa``: transactions in doubt, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text

from tests.cluster import Cluster
from tornado_sa.__main__ import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as people run it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tornado_sa", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    """A database with one transaction of another application in doubt, ``other's``."""
    name = f"tornado_sa_{uuid.uuid4().hex[:12]}"
    server = create_engine(cluster.url("postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = cluster.url("postgresql+psycopg").set(database=name, password="secret")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (text text)"))
    connection = engine.connect()
    connection.exec_driver_sql("INSERT INTO note VALUES ('hello')")
    connection.exec_driver_sql(f"PREPARE TRANSACTION 'other''s {name}'")
    connection.close()
    yield url.render_as_string(hide_password=False)
    main(["resolve", url.render_as_string(False), f"other's {name}", "--rollback"])
    engine.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


def xid_in(url: str) -> str:
    return f"other's {url.rpartition('/')[2]}"


def notes(url: str) -> list[str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = list(connection.scalars(text("SELECT text FROM note")))
    engine.dispose()
    return found


def test_lines_of_text_and_exit_code_1(url: str) -> None:
    done = run("in-doubt", url)
    assert done.returncode == 1, done.stderr
    xid, database, since, decision = done.stdout.rstrip("\n").split("\t")
    assert xid == xid_in(url)
    assert database == url.replace("secret", "***")
    assert since[:2] == "20"
    assert decision == "-"
    assert done.stderr == ""


def test_json(url: str) -> None:
    done = run("in-doubt", url, url, "--json")
    (row,) = json.loads(done.stdout)
    assert row["xid"] == xid_in(url)
    assert row["ours"] is False
    assert "secret" not in done.stdout


@pytest.mark.parametrize(("way", "stored"), [("--commit", ["hello"]), ("--rollback", [])])
def test_resolve(url: str, way: str, stored: list[str]) -> None:
    done = run("resolve", url, xid_in(url), way)
    assert (done.returncode, done.stderr) == (0, "")
    assert notes(url) == stored
    done = run("in-doubt", url)
    assert (done.returncode, done.stdout) == (0, "")
    done = run("resolve", url, xid_in(url), way)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No transaction")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+asyncpg://u:secret@127.0.0.1:1/d", "Write postgresql+psycopg://"),
        ("mysql+aiomysql://u:secret@127.0.0.1:1/d", "Write mysql+pymysql://"),
        ("sqlite:///x.db", "PostgreSQL, MySQL and MariaDB"),
        ("nonsense secret", "cannot be parsed"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "does not answer"),
    ],
)
def test_errors_are_one_line_without_the_password(
    url: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["in-doubt", url]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1
    assert "secret" not in said.err


def test_resolve_wants_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["resolve", "sqlite://", "x"])
    assert caught.value.code == 2
    assert "--commit --rollback" in capsys.readouterr().err

"""The README's examples run as pasted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, text

from tests.cluster import Cluster
from tests.pgbouncer import PgBouncer

README = Path(__file__).parents[1] / "README.rst"
BLOCKS = re.findall(
    r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text(), re.MULTILINE
)


def run(block: str, folder: Path, **environment: str) -> None:
    """Run an example as a program, or with pytest if it is a test."""
    script = folder / ("test_example.py" if "import pytest" in block else "example.py")
    script.write_text(dedent(block))
    command = [sys.executable, "-W", "error", str(script)]
    if "import pytest" in block:
        config = README.with_name("pyproject.toml")
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(config), str(script)]
        script.with_name("conftest.py").write_text("from tests.conftest import io_loop\n")
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(README.parent), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_there_is_an_example_for_each_question() -> None:
    assert len(re.findall(r"^[1-7]\. .*\?\n~~~", README.read_text(), re.MULTILINE)) == 7
    assert len(BLOCKS) == 18


PROGRAMS = [block for block in BLOCKS[1:] if "SIGTERM" not in block]


@pytest.mark.parametrize("block", PROGRAMS, ids=[f"block{i}" for i in range(len(PROGRAMS))])
def test_example(block: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "DATABASE_URL" in block:
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.url("postgresql+psycopg")
        other = url.set(database="other")
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("DROP DATABASE IF EXISTS other"))
            connection.execute(text("CREATE DATABASE other"))
        engine.dispose()
        run(block, tmp_path, DATABASE_URL=str(url), OTHER_DATABASE_URL=str(other))
    elif "PGBOUNCER_URL" in block:
        pooler: PgBouncer = request.getfixturevalue("pgbouncer")
        app, reader = (pooler.url("postgresql+asyncpg", name) for name in ("", "reader"))
        run(block, tmp_path, PGBOUNCER_URL=app, PGBOUNCER_READER=reader)
    else:
        run(block, tmp_path)


@contextmanager
def serving(block: str, folder: Path, url: str, data: bytes | None) -> Iterator[bytes]:
    """Run an example that is a server, and yield its first answer; it ends by SIGTERM."""
    (folder / "app.py").write_text(dedent(block))
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "app.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
    )
    try:
        for _ in range(100):
            try:
                with urllib.request.urlopen(url, data) as response:
                    answer = response.read()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield answer
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait()
    assert code == (0 if "SIGTERM" in block else -signal.SIGTERM)


def test_first_application(tmp_path: Path) -> None:
    assert len(dedent(BLOCKS[0]).strip().splitlines()) < 32
    url = "http://127.0.0.1:8888/notes/1"
    with serving(BLOCKS[0], tmp_path, url, b"text=hello"):
        assert urllib.request.urlopen(url).read() == b"hello"


def test_shutdown(tmp_path: Path) -> None:
    (block,) = set(BLOCKS[1:]) - set(PROGRAMS)
    with serving(block, tmp_path, "http://127.0.0.1:8889/", None) as answer:
        assert answer == b"hello"

"""The README's examples run as pasted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, text

from tests.cluster import Cluster

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
    assert len(BLOCKS) == 15


@pytest.mark.parametrize("block", BLOCKS[1:], ids=[f"block{i}" for i in range(1, len(BLOCKS))])
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
    else:
        run(block, tmp_path)


def test_first_application(tmp_path: Path) -> None:
    assert len(dedent(BLOCKS[0]).strip().splitlines()) < 32
    (tmp_path / "app.py").write_text(dedent(BLOCKS[0]))
    server = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
    )
    try:
        url = "http://127.0.0.1:8888/notes/1"
        for _ in range(100):
            try:
                urllib.request.urlopen(url, b"text=hello").close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        assert urllib.request.urlopen(url).read() == b"hello"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()

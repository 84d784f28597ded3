"""The recipes of docs/testing.rst run as pasted, each by its runner and by no other plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from sqlalchemy import make_url

PAGE = Path(__file__).parents[1] / "docs" / "testing.rst"
BLOCKS = [
    dedent(block)
    for block in re.findall(
        r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", PAGE.read_text(), re.MULTILINE
    )
]
FILES = {block.split("\n", 1)[0].removeprefix("# "): block for block in BLOCKS}
PLUGINS = ("asyncio", "anyio", "tornado", "randomly", "xdist")


def pytest_in(folder: Path, plugins: str, *options: str, **env: str) -> Any:
    """Run pytest in ``folder``, with these plugins only. Warnings are errors."""
    settings = "asyncio_default_fixture_loop_scope = function\n" * ("asyncio" in plugins)
    (folder / "pytest.ini").write_text(f"[pytest]\n{settings}")  # not those of this project
    others = [f"-pno:{name}" for name in PLUGINS if name not in plugins.split()]
    known = ["-Wignore:pkg_resources:UserWarning", "-Wignore:pkg_resources:DeprecationWarning"]
    known += ["-Wignore:Deprecated call to `pkg_resources:DeprecationWarning"]
    known += ["-Wignore:The hookimpl pytest_:pytest.PytestDeprecationWarning"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-Werror", *known, *others, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PAGE.parents[1]), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def run(
    folder: Path, files: list[str], plugins: str, *options: str, passed: int, **env: str
) -> None:
    """Run these files with pytest, with these plugins; as many tests have to pass."""
    for name in ["notes.py", *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES[name])
    done = pytest_in(folder, plugins, *options, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout


def test_every_recipe_is_run() -> None:
    assert len(FILES) == len(BLOCKS) == 9


@pytest.mark.parametrize(
    ("runner", "plugins", "passed"),
    [
        ("pytest_tornado", "tornado", 3),
        ("pytest_asyncio", "asyncio", 2),
        ("anyio", "anyio", 2),
        ("async_http_test_case", "", 4),
    ],
)
def test_recipe(runner: str, plugins: str, passed: int, tmp_path: Path) -> None:
    run(tmp_path, [f"test_with_{runner}.py"], plugins, passed=passed)


def test_alembic(tmp_path: Path, postgresql_url: str) -> None:
    """On two workers, in any order."""
    url = make_url(postgresql_url).set(drivername="postgresql+psycopg")
    files = ["conftest.py", "test_migrated.py", "migrations/env.py"]
    files.append("migrations/versions/0001_note.py")
    text = url.render_as_string(hide_password=False)
    run(tmp_path, files, "xdist randomly", "-n2", passed=3, DATABASE_URL=text)


LEFT_OUT = """\
# test_left_out.py
import pytest
from notes import Base
from tornado_sa import Database, TornadoSAError
from tornado_sa.testing import isolated

@pytest.fixture(scope="module")
def db():
    db = Database("sqlite://")
    yield db
    db.dispose()

@pytest.fixture
def nothing_left_out(request):
    return "forgives" not in request.node.name

@pytest.fixture
def isolation_options():
    return {"timeout": 0.25}

def test_fails(isolated_db):
    isolated_db.scope("forgotten").__enter__()

def test_forgives(isolated_db):
    isolated_db.scope("forgiven").__enter__()

def test_options(isolated_db):
    with isolated_db.begin(), pytest.raises(TornadoSAError):
        with isolated_db.begin():
            pass
    with pytest.raises(TornadoSAError, match="on already"), isolated(isolated_db):
        pass
"""


def test_a_test_that_leaves_something_out_fails(tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text(FILES["notes.py"])
    (tmp_path / "test_left_out.py").write_text(LEFT_OUT)
    done = pytest_in(tmp_path, "")
    assert "3 passed, 1 error" in done.stdout, done.stdout
    assert "The test has left out: the unit of work 'forgotten' (" in done.stdout

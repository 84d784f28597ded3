"""The recipes of docs/testing.rst run as pasted, each by its runner and by no other plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

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


def run(
    folder: Path, files: list[str], plugins: str, *options: str, passed: int, **env: str
) -> None:
    """Run these files with pytest, with these plugins; as many tests have to pass."""
    for name in ["notes.py", *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES[name])
    settings = "asyncio_default_fixture_loop_scope = function\n" * ("asyncio" in plugins)
    (folder / "pytest.ini").write_text(f"[pytest]\n{settings}")  # not those of this project
    others = [f"-pno:{name}" for name in PLUGINS if name not in plugins.split()]
    known = ["-Wignore:pkg_resources:UserWarning", "-Wignore:pkg_resources:DeprecationWarning"]
    known += ["-Wignore:Deprecated call to `pkg_resources:DeprecationWarning"]
    known += ["-Wignore:The hookimpl pytest_:pytest.PytestDeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-Werror", *known, *others, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PAGE.parents[1]), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
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

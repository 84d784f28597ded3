"""A PostgreSQL server of the tests' own, to stop, start and configure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sqlalchemy import URL
from tornado.testing import bind_unused_port

from tests.support import missing


class Cluster:
    """A PostgreSQL server of our own, to stop and start."""

    def __init__(self, folder: Path) -> None:
        found = [
            *Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"),
            *Path("/usr/bin").glob("pg_ctl"),
        ]
        if not found:
            missing("postgresql", "no pg_ctl to start one with")
        self.bin = found[0].parent
        self.folder = folder
        sock, self.port = bind_unused_port()
        sock.close()
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        folder.mkdir(parents=True)
        if self.as_user:
            subprocess.run(["chown", "postgres", folder], check=True)
        self.run("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        self.start()

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.as_user, str(self.bin / program), "-D", str(self.folder), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = (
            f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
            " -c max_prepared_transactions=10"
        )
        self.run("pg_ctl", "start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-w", "-m", "immediate")

    def url(self, driver: str) -> URL:
        return URL.create(driver, "postgres", None, "127.0.0.1", self.port, "postgres")

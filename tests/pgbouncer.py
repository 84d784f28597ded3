"""A PgBouncer in transaction mode, of the tests' own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from sqlalchemy import make_url
from tornado.testing import bind_unused_port

from tests.support import missing

CONFIGURATION = """
[databases]
{name} = host={host} port={port}
{name}_reader = host={host} port={port} dbname={name} {connect_query}
{name}_dropped = host={host} port={port} dbname={name}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = 3
ignore_startup_parameters = default_transaction_read_only,options
"""


class PgBouncer:
    """PgBouncer before the database at ``url``: three connections for all of its clients."""

    def __init__(self, folder: Path, url: str) -> None:
        program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
        if program is None:
            missing("pgbouncer", "it is not installed")
        target = make_url(url)
        self.name = target.database
        self.user = target.username or "postgres"
        sock, self.port = bind_unused_port()
        sock.close()
        configuration = CONFIGURATION.format(
            name=self.name,
            host=target.host,
            port=target.port or 5432,
            listen_port=self.port,
            folder=folder,
            connect_query="connect_query='SET default_transaction_read_only = on'",
        )
        (folder / "pgbouncer.ini").write_text(configuration)
        (folder / "users.txt").write_text(f'"{self.user}" "{target.password or ""}"\n')
        as_user: list[str] = []
        if os.getuid() == 0:  # which it refuses to run as
            as_user = ["runuser", "-u", "postgres", "--"]
            subprocess.run(["chown", "-R", "postgres", folder], check=True)
        with (folder / "log").open("w") as log:
            command = [*as_user, program, "-q", str(folder / "pgbouncer.ini")]
            self.process = subprocess.Popen(command, stderr=log)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError("PgBouncer does not answer")

    def url(self, driver: str, reader: str = "") -> str:
        """The URL of the database, of its ``reader``, or of the one whose reader is ``dropped``."""
        name = f"{self.name}_{reader}" if reader else self.name
        return f"{driver}://{self.user}@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

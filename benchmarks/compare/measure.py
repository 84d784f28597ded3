"""One contestant at a time: started on core 0, and asked by wrk from core 1."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
SERVER_CORE, LOAD_CORE = 0, 1
STARTS_WITHIN = 30.0  # seconds
PROBE_EVERY = 0.02  # seconds


@dataclass(frozen=True)
class Contestant:
    name: str
    script: str
    options: tuple[str, ...] = ()
    loops: tuple[str, ...] = ("asyncio", "uvloop")
    paths: tuple[str, ...] = ("/plain", "/db", "/queries", "/update", "/slow", "/hold")


@dataclass(frozen=True)
class Load:
    """A path, and how many clients ask for it at once, each as soon as it has its answer."""

    path: str
    clients: int
    query: str = ""
    watched: bool = False  # is the loop free meanwhile? Asked by /plain, 50 times a second

    @property
    def name(self):
        return f"{self.path} {self.clients}"


@dataclass(frozen=True)
class Result:
    rate: float  # requests per second
    p50: float  # milliseconds
    p99: float  # milliseconds
    cpu: float  # of the server, microseconds per request
    failed: int  # requests that were not answered, or not with 2xx
    gap: float = 0.0  # the longest that /plain took, in milliseconds, where it was watched


class Server:
    """A contestant that runs."""

    def __init__(self, process, port):
        self.port = port
        self.pid = process.pid
        self._root = psutil.Process(process.pid)

    def _all(self):
        return [self._root, *self._root.children(recursive=True)]

    def cpu(self):
        """Seconds of CPU that it has taken."""
        times = [process.cpu_times() for process in self._all()]
        return sum(one.user + one.system for one in times)

    def memory(self):
        """What it holds for itself, in MiB: a page shared by two processes counts half for each."""
        return sum(process.memory_full_info().pss for process in self._all()) / 2**20

    def measure(self, load, seconds):
        command = ["wrk", "-t1", f"-c{load.clients}", f"-d{seconds}s", "--timeout", "5s", "-s"]
        url = f"http://127.0.0.1:{self.port}{load.path}{load.query}"
        with self._watch(load.watched) as gaps:
            before = self.cpu()
            output = subprocess.run(
                [*command, HERE / "report.lua", url],
                preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            cpu = self.cpu() - before
        line = next(one for one in output.splitlines() if one.startswith("RESULT"))
        requests, duration, p50, p99, failed = map(int, line.split()[1:])
        if not requests:
            raise SystemExit(f"{load.name}: nothing was answered within {seconds} s")
        return Result(
            rate=requests / duration * 1e6,
            p50=p50 / 1e3,
            p99=p99 / 1e3,
            cpu=cpu / requests * 1e6,
            failed=failed,
            gap=max(gaps, default=0.0) * 1e3,
        )

    @contextmanager
    def _watch(self, wanted):
        gaps, over = [], threading.Event()

        def probe():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            while not over.wait(PROBE_EVERY):
                began = time.monotonic()
                connection.request("GET", "/plain")
                response = connection.getresponse()
                response.read()
                gaps.append(time.monotonic() - began)
                assert response.status == 200, response.status
            connection.close()

        if not wanted:
            yield gaps
            return
        with ThreadPoolExecutor(1) as executor:
            probing = executor.submit(probe)
            try:
                yield gaps
            finally:
                over.set()
            probing.result()


@contextmanager
def serving(contestant, loop, database):
    """Start ``contestant`` and yield its `Server`; end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = HERE / "contestants" / contestant.script
    options = ["--port", str(port), "--loop", loop, "--database", database, *contestant.options]
    process = subprocess.Popen(
        [sys.executable, script, *options],
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )
    try:
        wait_until_ready(process, port)
        yield Server(process, port)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process, port):
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/plain")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(
        f"{process.args[1]} did not answer /plain with 200 (exit code {process.poll()})"
    )

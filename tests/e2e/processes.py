"""Watching real commands: several at once, one in mid-run, and whether any process is left."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil

from support.commands import start

Result = TypeVar("Result")


def together(*calls: Callable[[], Result], at_once: int = 2) -> list[Result]:
    """The results of all calls, in order; a launch is half waiting, so two at once take little longer than one."""
    with ThreadPoolExecutor(at_once) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def files_in(folder: Path) -> set[str]:
    """Files under `folder`, by relative path; those in `.run` are left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if ".run" not in path.parts}


class Running:
    """A command under way, killed on leaving the `with` if it is not over. `err` grows as it writes to stderr."""

    def __init__(self, arguments: Sequence[str], cwd: Path, *, fresh: bool = False, **env: str) -> None:
        self.process = start(arguments, cwd, fresh=fresh, **env)
        self.err = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_failure: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.err += line

    def wait_for(self, pattern: str, timeout: float = 60) -> None:
        """Until a line of stderr matches."""
        give_up = time.monotonic() + timeout
        while not re.search(pattern, self.err, re.MULTILINE):
            assert self.process.poll() is None and time.monotonic() < give_up, f"no {pattern!r} in:\n{self.err}"
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.environ().get("RANK") == str(number))

    def finish(self, timeout: float = 60) -> int:
        """Wait for its end; returns the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code


def processes_about(text: str, within: float = 10) -> list[str]:
    """Command lines that contain `text` and are still there after `within` seconds (it returns when none is)."""
    give_up = time.monotonic() + within
    while left := [line for line in _command_lines() if text in line]:
        if time.monotonic() > give_up:
            break
        time.sleep(0.1)
    return left


def _command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]

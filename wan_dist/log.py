"""Logging: one logger for the package, one file per rank, quiet terminals.

The terminal belongs to the user: it gets what they asked for (progress, paths, one error). Everything else goes to
the rank's log file in the run directory.
"""

import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger("wan_dist")


def rank_log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"rank{rank}.log"


def log_to_file(path: Path, rank: int) -> None:
    """Send the log of this rank to `path` (appended), and nowhere else (under torchrun Hydra has set a terminal)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers[:] = [handler]
    logger.setLevel(logging.INFO)


def silence(path: Path) -> None:
    """Point this process's stdout and stderr, C++ code included, at `path`: for ranks other than 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)

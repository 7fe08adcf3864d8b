"""Running the real commands as a user would."""

import importlib.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from support.warm import BIN, WarmProcess, can_name_itself

REPO = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a plain shell: no torchrun or Slurm variables, one thread, offline."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PYTEST"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        env.pop(name, None)
    return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def start(arguments: Sequence[str], cwd: Path, *, fresh: bool = False, **env: str) -> subprocess.Popen[str]:
    """Start a command of this environment (`wan-dist`, `torchrun`, `python`) in `cwd`, output captured.

    fresh: with an interpreter of its own, as a shell would; else forked from this process, which takes a fraction of
    the time (`support.warm`). A command of another environment always has its own.
    """
    program = BIN / arguments[0]
    warm = not fresh and program.parent == BIN and can_name_itself()
    return (WarmProcess if warm else subprocess.Popen)(
        [str(program), *arguments[1:]],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    arguments: Sequence[str], cwd: Path, timeout: float = 120, *, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(arguments, cwd, fresh=fresh, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


def wan_dist(
    *overrides: str, cwd: Path, timeout: float = 120, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    return run(["wan-dist", *overrides], cwd, timeout, fresh=fresh, **env)


def torchrun(
    ranks: int, *overrides: str, cwd: Path, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    launcher = str(REPO / "launch" / "generate.py")
    return run(["torchrun", "--nproc-per-node", str(ranks), launcher, *overrides], cwd, fresh=fresh, **env)


def load_script(path: Path) -> ModuleType:
    """A script of `launch` as a module, not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

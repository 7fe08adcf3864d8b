"""Running the real commands as a user would."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    """The environment of a plain shell: no torchrun or Slurm variables, one thread, offline."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "PYTEST"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        env.pop(name, None)
    return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def start(arguments: Sequence[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start a command of this environment (`wan-dist`, `torchrun`, `python`) in `cwd`, output captured."""
    return subprocess.Popen(
        [str(BIN / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: Sequence[str], cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(arguments, cwd, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


def wan_dist(*overrides: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    return run(["wan-dist", *overrides], cwd, timeout, **env)


def torchrun(ranks: int, *overrides: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = str(REPO / "launch" / "generate.py")
    return run(["torchrun", "--nproc-per-node", str(ranks), launcher, *overrides], cwd, **env)


def load_script(path: Path) -> ModuleType:
    """A script of `launch` as a module, not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

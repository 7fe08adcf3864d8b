"""Programs of this environment that start at once: forked from this process, which has imported their libraries.

Such a program is a process like any other: command line, environment, working folder, pipes, session and exit code are
its own, and its ranks are forked from its agent. What it leaves out is to start an interpreter and to import torch,
most of the time of a short run; a test of that start (what is imported, how soon, in how much memory) needs a fresh
process.
"""

import atexit
import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import io
import logging
import mmap
import os
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

BIN = Path(sys.executable).parent
_TESTS = str(Path(__file__).resolve().parents[1])
_EXECUTE = inspect.signature(subprocess.Popen._execute_child)
_one_at_a_time = threading.Lock()
# `struct prctl_mm_map` of <linux/prctl.h>, and the fields of /proc/PID/stat that its first ones are (man proc).
_PR_SET_MM, _PR_SET_MM_MAP, _PR_SET_MM_MAP_SIZE = 35, 14, 15
_MM_MAP = struct.Struct("=11QQIi")
_START_CODE, _END_CODE, _START_STACK, _START_DATA, _END_DATA, _START_BRK = 26, 27, 28, 45, 46, 47
_MODULES = (  # of agents, ranks, benches and torchrun
    *(
        "wan_dist.cli.main",
        "wan_dist.worker",
        "wan_dist.pipeline.generate",
        "wan_dist.pipeline.decode",
        "wan_dist.bench",
    ),
    *("hydra.main", "av", "torch.distributed.run", "torch.distributed.launcher.api"),
    *("torch.distributed.fsdp", "torch.testing._internal.distributed.fake_pg", "diffusers.pipelines.wan.pipeline_wan"),
    *("diffusers.pipelines.wan.pipeline_wan_i2v", "transformers.models.umt5.modeling_umt5"),
    *("transformers.models.clip.modeling_clip", "diffusers.schedulers.scheduling_unipc_multistep"),
)


@functools.cache
def can_name_itself() -> bool:
    """Whether the kernel lets a process change its command line, without which tests could not find it."""
    if sys.platform != "linux":
        return False
    size = ctypes.c_uint(0)
    code = ctypes.CDLL(None).prctl(_PR_SET_MM, _PR_SET_MM_MAP_SIZE, ctypes.byref(size), 0, 0)
    return code == 0 and size.value == _MM_MAP.size


class WarmProcess(subprocess.Popen):
    """`Popen` of `python [-P] [-u] (-m MODULE | -c CODE | FILE) ...` or of a Python script of this environment."""

    def _execute_child(self, *values: Any) -> None:
        """Returns when the program begins, as `Popen` does. Raises RuntimeError where it cannot."""
        asked = _EXECUTE.bind(self, *values).arguments
        with _one_at_a_time:  # another child would keep the pipe of this one open
            levels = _import_modules()
            told, tell = os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                _begin(asked, tell, levels)
            self._child_created = True
            os.close(tell)
            with os.fdopen(told) as pipe:
                failure = pipe.read()
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in names))
        if failure:
            self.wait()
            raise RuntimeError(failure)


@functools.cache
def _import_modules() -> dict[str, int]:
    """The levels that libraries have given their loggers."""
    for name in _MODULES:
        importlib.import_module(name)
    Plugins.instance()  # Hydra's look for themselves
    return {name: it.level for name, it in logging.root.manager.loggerDict.items() if isinstance(it, logging.Logger)}


def _begin(asked: Mapping[str, Any], tell: int, levels: Mapping[str, int]) -> NoReturn:
    _one_at_a_time.release()  # it was held over the fork
    try:
        arguments, _named = _become(asked, tell, levels)  # kept: it is there that the kernel reads
    except BaseException:
        os.write(tell, traceback.format_exc().encode())
        os._exit(255)
    os.close(tell)
    try:
        _run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(255)


def _become(asked: Mapping[str, Any], tell: int, levels: Mapping[str, int]) -> tuple[list[str], mmap.mmap]:
    """Put off what this process has of the one that it was forked from; returns its command line, and where that is."""
    arguments, env = [os.fspath(word) for word in asked["args"]], dict(asked["env"] or os.environ)
    if asked["start_new_session"]:
        os.setsid()
    for own, given in enumerate((asked["p2cread"], asked["c2pwrite"], asked["errwrite"])):
        if given != -1:
            os.dup2(given, own)
    _forget(tell, levels)
    os.environ.clear()
    os.environ.update(env)
    if asked["cwd"] is not None:
        os.chdir(asked["cwd"])
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = WarmProcess
    return arguments, _name_this_process(arguments, env)


def _forget(tell: int, levels: Mapping[str, int]) -> None:
    """Signal handlers, files, loggers, warnings and whatever else is pytest's, or the agent's."""
    faulthandler.disable()
    atexit._clear()
    gc.freeze()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, tell)
    os.closerange(tell + 1, os.sysconf("SC_OPEN_MAX"))
    tempfile.tempdir = None
    logging.root.handlers.clear()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    importlib.reload(warnings)
    GlobalHydra.instance().clear()


def _run(arguments: Sequence[str]) -> NoReturn:
    words = list(arguments[1:] if Path(arguments[0]).name.startswith("python") else arguments)
    flags = set()
    while words[0] in ("-P", "-u"):
        flags.add(words.pop(0))
    how = words.pop(0) if words[0] in ("-m", "-c") else None
    _open_streams(unbuffered="-u" in flags)
    sys.argv = ["-c", *words[1:]] if how == "-c" else words
    folders = {"-c": "", "-m": os.getcwd(), None: str(Path(words[0]).parent)}
    _set_path([] if "-P" in flags else [folders[how]])
    code: Any = 0
    try:
        if how == "-m":
            sys.modules.pop(words[0], None)  # it runs anew, as `__main__`
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(words[0], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _set_path(own: list[str]) -> None:
    """Where modules are found; where there is a `sitecustomize`, wan_dist is imported anew, for it to change."""
    more = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*own, *more, *(folder for folder in sys.path if folder != _TESTS)]
    if PathFinder.find_spec("sitecustomize", more):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("wan_dist", "sitecustomize")]:
            del sys.modules[name]
        importlib.import_module("sitecustomize")


def _open_streams(*, unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw: Any = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding="utf-8",
            errors="strict" if number == 1 else "backslashreplace",
            line_buffering=number == 2,
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for handler in [reference() for reference in logging._handlerList]:  # of libraries, made when they were imported
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr


def _name_this_process(arguments: Sequence[str], env: Mapping[str, str]) -> mmap.mmap:
    """Make these what the kernel, and so `ps`, tells of this process; returns the memory in which they are."""
    words = b"".join(os.fsencode(word) + b"\0" for word in arguments)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    block = mmap.mmap(-1, len(words) + len(variables), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(words + variables)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(block))
    mid, end = begin + len(words), begin + len(words) + len(variables)
    stat = ["", "", "", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
    code, data = (int(stat[_START_CODE]), int(stat[_END_CODE])), (int(stat[_START_DATA]), int(stat[_END_DATA]))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    heap, stack = (int(stat[_START_BRK]), libc.sbrk(0)), int(stat[_START_STACK])
    told = ctypes.create_string_buffer(_MM_MAP.pack(*code, *data, *heap, stack, begin, mid, mid, end, 0, 0, -1))
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, told, ctypes.c_size_t(_MM_MAP.size), 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot be named")
    return block

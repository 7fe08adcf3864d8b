"""Processes that are forked in place of fresh ones: whatever a test can see of them is the same."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from support.commands import run, start
from support.warm import BIN, can_name_itself

pytestmark = pytest.mark.skipif(not can_name_itself(), reason="the kernel does not let a process name itself")

PROGRAMS = {
    "its surroundings": """
        import logging, os, signal, sys, tempfile, warnings
        print(sys.argv, os.getcwd(), tempfile.gettempdir(), sorted(os.environ.items()))
        print([signal.getsignal(n) for n in signal.valid_signals()], logging.root.handlers, os.listdir("/proc/self/fd"))
        print(sys.path[0], [folder for folder in sys.path if folder.endswith("tests")], __name__)
        warnings.warn("seen")
        logging.warning("seen too")
    """,
    "a code": "import sys; sys.exit(75)",
    "a message": "import sys; print('begun'); sys.exit('no: \\udcff')",
    "an error": "print('begun'); 1 / 0",
    "an early end": "import os; print('said', flush=True); os._exit(3)",
    "a death": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "something at exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "a thread": """
        import threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), print("the thread's"))).start()
        print("the program's")
    """,
    "loggers": """
        import logging, torch
        names = ("torch", "torch.distributed", "torch.distributed.elastic.agent.server.api")
        print([logging.getLogger(name).getEffectiveLevel() for name in names])
    """,
    "a child": """
        import os, subprocess, sys
        child = subprocess.run([sys.executable, "-c", "import os; print(os.environ['MINE'])"], capture_output=True)
        print(child.stdout, os.getsid(0) == os.getsid(os.getppid()), sys.stdin.fileno())
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_forked_program_is_like_a_fresh_one(program, tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT", "behind")
    words, env = ["python", "-c", textwrap.dedent(PROGRAMS[program]), "a word", ""], {"MINE": "ö", "TMPDIR": "/"}
    with ThreadPoolExecutor(1) as pool:  # as fixtures start several at once
        ends = [pool.submit(run, words, tmp_path, fresh=fresh, **env).result() for fresh in (True, False)]
    assert ends[0].returncode == ends[1].returncode
    said = [end.stdout.splitlines() for end in ends]
    assert said[0] == said[1]
    last = [end.stderr.splitlines()[-1:] for end in ends]
    assert last[0] == last[1]


def test_it_is_found_at_once_by_its_command_line_and_variables(tmp_path):
    words = ["python", "-P", "-u", "-c", "import time; time.sleep(60)", str(tmp_path / "a folder")]
    with start(words, tmp_path, RANK="7") as process:
        seen = psutil.Process(process.pid)
        assert seen.cmdline() == [str(BIN / "python"), *words[1:]]
        assert seen.environ()["RANK"] == "7" and seen.cwd() == str(tmp_path) and seen.ppid() == os.getpid()
        process.kill()
    assert process.returncode == -9


def test_what_a_sitecustomize_changes_is_changed(tmp_path):
    import wan_dist.topology

    (tmp_path / "sitecustomize.py").write_text("import wan_dist.topology\nwan_dist.topology.EXIT_STOPPED = 76\n")
    words = ["python", "-c", "from wan_dist.topology import EXIT_STOPPED as code; raise SystemExit(code)"]
    assert [run(words, tmp_path, PYTHONPATH=path).returncode for path in (str(tmp_path), "")] == [76, 75]
    assert wan_dist.topology.EXIT_STOPPED == 75


def test_other_environments_and_fresh_ones_are_not_forked(tmp_path):
    show = "import sys; print('torch' in sys.modules)"
    assert run(["python", "-c", show], tmp_path).stdout == "True\n"
    assert run(["python", "-c", show], tmp_path, fresh=True).stdout == "False\n"
    own = subprocess.check_output([sys.executable, "-c", "import sys; print(sys.base_prefix)"], text=True).strip()
    assert run([f"{own}/bin/python3", "-c", show], tmp_path).stdout == "False\n"


def test_what_cannot_begin_is_told(tmp_path):
    for fresh, kind in ((True, FileNotFoundError), (False, RuntimeError)):
        with pytest.raises(kind, match=r"No such file or directory: .*nowhere"):
            start(["python", "-c", "pass"], tmp_path / "nowhere", fresh=fresh)

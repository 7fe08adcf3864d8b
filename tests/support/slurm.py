"""A throw-away Slurm: a real controller and real nodes on this machine, for a test session.

Everything lives in one folder: configuration, munge key, state, spool, logs, and the pid file of every daemon. With
`netns=True` (root only) each node has a network namespace and a host name of its own, joined by a bridge, so that a
node can be cut off; otherwise all nodes share the machine's loopback. Root or not, the configuration is the same: the
daemons and the jobs run as whoever starts them.
"""

import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from support.commands import BIN, environment

OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")  # where daemons and `ip` are, and a user's PATH often does not lead
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
_NETWORK_PROGRAMS = ("ip", "nsenter", "unshare")
_SHAPE = "CPUs=64 Gres=gpu:8"  # of a node, whatever is there: nothing is bound to cores or devices
_CONFIGURATION = """\
ClusterName=wantest
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/slurmd-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2,requeue_setup_env_fail
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
"""


def why_not(*, netns: bool = False) -> str | None:
    """What this machine lacks to run a cluster, or None."""
    programs = (*_PROGRAMS, *(_NETWORK_PROGRAMS if netns else ()))
    if missing := [program for program in programs if shutil.which(program, path=_path()) is None]:
        return f"Slurm tests need {', '.join(missing)} (packages slurm-wlm, munge, iproute2)"
    if netns and os.geteuid() != 0:
        return "network namespaces need root"
    return None


def networks_refused() -> str | None:
    """Why the kernel gives not even root a network namespace (a container may lack the capability), or None."""
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Network:
    """A bridge, and for each node a network namespace with one link to it. `number` names node 1, 2, ..."""

    def __init__(self, nodes: int) -> None:
        self.tag, self.prefix = f"w{secrets.token_hex(2)}", f"10.77.{random.randrange(1, 250)}"
        self.address, self.nodes = f"{self.prefix}.1", nodes

    def node_address(self, number: int) -> str:
        return f"{self.prefix}.{10 + number}"

    def namespace(self, number: int) -> str:
        return f"{self.tag}-n{number}"

    def up(self) -> None:
        bridge = f"{self.tag}-br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(1, self.nodes + 1):
            namespace, link = self.namespace(number), f"{self.tag}-v{number}"
            _ip("netns", "add", namespace)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", link, "master", bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{self.node_address(number)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")

    def set_link(self, number: int, state: str) -> None:
        """`up` or `down`: at the bridge's end, as when a cable is pulled."""
        _ip("link", "set", f"{self.tag}-v{number}", state)

    def steps(self, number: int) -> list[int]:
        """Process ids of the job steps that a node runs."""
        inside = _ip("netns", "pids", self.namespace(number)).split()
        named = [process for process in psutil.process_iter(["name"]) if process.info["name"].startswith("slurmstepd")]
        return [process.pid for process in named if str(process.pid) in inside]

    def down(self) -> None:
        """Remove whatever is there of it."""
        for number in range(1, self.nodes + 1):
            _ip("link", "del", f"{self.tag}-v{number}", check=False)
            _ip("netns", "del", self.namespace(number), check=False)
        _ip("link", "del", f"{self.tag}-br", check=False)

    def hosts(self) -> str:
        """The nodes' /etc/hosts."""
        lines = ["127.0.0.1 localhost", f"{self.address} {_host()}"]
        return "\n".join(lines + [f"{self.node_address(n)} node{n}" for n in range(1, self.nodes + 1)]) + "\n"


class Cluster:
    """A running cluster of `node1`, `node2`, ...; made by `cluster`."""

    def __init__(self, folder: Path, nodes: int, network: Network | None) -> None:
        self.folder, self.nodes, self.network = folder, nodes, network
        self.configuration = folder / "slurm.conf"

    def environment(self, **extra: str) -> dict[str, str]:
        """A plain shell's environment that leads to this cluster, and to `wan-dist` on the CPU."""
        own = {"SLURM_CONF": str(self.configuration), "PATH": _path(), "CUDA_VISIBLE_DEVICES": ""}
        return environment(**{**own, **extra})

    def command(self, *words: str, cwd: Path | None = None, check: bool = True, **env: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment(**env), capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0 or not check, f"{words}:\n{done.stderr}"
        return done.stdout

    def submit(self, arguments: list[str], cwd: Path, **env: str) -> str:
        """`sbatch` with these arguments; returns the job's id."""
        return self.command("sbatch", "--parsable", *arguments, cwd=cwd, **env).strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job (`12`, or `12_1` of an array)."""
        text = self.command("scontrol", "show", "job", job, "-o")
        return dict(re.findall(r"([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|\s*\Z)", text, re.DOTALL))

    def wait(self, job: str, timeout: float = 60) -> dict[str, str]:
        """Until the job is over; returns what `show` then says."""
        return self.wait_until(job, lambda shown: shown["JobState"] in OVER, timeout)

    def wait_until(self, job: str, there: Callable[[dict[str, str]], bool], timeout: float = 30) -> dict[str, str]:
        """Until `there` is true of what `show` says (never `sbatch --wait`, which looks every 10 s)."""
        give_up = time.monotonic() + timeout
        while not there(shown := self.show(job)):
            assert time.monotonic() < give_up, f"job {job} after {timeout} s: {shown}\n{self.output(job)}"
            time.sleep(0.2)
        return shown

    def wait_for_output(self, job: str, pattern: str, timeout: float = 60) -> None:
        """Until a line of the job's output matches."""
        give_up = time.monotonic() + timeout
        while not re.search(pattern, self.output(job), re.MULTILINE):
            over = self.show(job)["JobState"] in OVER
            assert not over and time.monotonic() < give_up, f"no {pattern!r} in:\n{self.output(job)}"
            time.sleep(0.2)

    def output(self, job: str) -> str:
        """The job's output file so far."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def requeue(self, job: str) -> None:
        """Stop the job and have it started again, at once."""
        self.command("scontrol", "requeue", job)
        self.release(job)

    def release(self, job: str, timeout: float = 30) -> None:
        """Start a requeued job soon: Slurm holds it for two minutes."""
        give_up, begun = time.monotonic() + timeout, {"RUNNING", "COMPLETING", *OVER}
        self.wait_until(job, lambda shown: shown["JobState"] in ("PENDING", "REQUEUED"), timeout)
        time.sleep(2)  # nodes refuse a job in the very second in which they ended it ("credential revoked")
        while self.show(job)["JobState"] not in begun:
            assert time.monotonic() < give_up, f"job {job} is still held: {self.show(job)}"
            self.command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)  # refused while it ends
            time.sleep(0.2)

    def cancel(self, job: str) -> None:
        self.command("scancel", job)

    def signal(self, job: str, name: str, *, batch: bool = True) -> None:
        """Send a signal, to the batch shell alone (as Slurm's `--signal=B:` does) or to the steps."""
        self.command("scancel", f"--signal={name}", *(["--batch"] if batch else []), job)

    def cut_off(self, node: str) -> None:
        """Take a node's network away."""
        assert self.network is not None, "only nodes with a network of their own can be cut off"
        self.network.set_link(int(node.removeprefix("node")), "down")

    def restore(self, node: str, timeout: float = 60) -> None:
        """Give a node its network back, and wait until it has let go of the jobs that were taken from it: ending those,
        it would kill one that was requeued and has the same number."""
        assert self.network is not None, "only nodes with a network of their own can be cut off"
        number, give_up = int(node.removeprefix("node")), time.monotonic() + timeout
        self.network.set_link(number, "up")
        while self.network.steps(number):
            assert time.monotonic() < give_up, f"{node} still runs steps of jobs that were taken from it"
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path, nodes: int = 2, netns: bool = False) -> Iterator[Cluster]:
    """A cluster whose nodes are all idle; on leaving, its jobs, daemons, networks and folder are removed."""
    network = Network(nodes) if netns else None
    running = Cluster(folder, nodes, network)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("munge", "state", "log", "pid", "no-cgroup", *(f"spool-node{n}" for n in range(1, nodes + 1))):
            (folder / name).mkdir(parents=True, mode=0o755)
        if network is not None:
            undo.callback(network.down)
            network.up()
        _write_configuration(running)
        undo.callback(_stop, folder / "pid" / "munged")
        _start_munge(running)
        undo.callback(_stop, folder / "pid" / "slurmctld")
        _daemon(running, "slurmctld", "-c", "-f", str(running.configuration))
        undo.callback(_stop_nodes, running)
        for number in range(1, nodes + 1):
            _start_node(running, number)
        _wait_until_idle(running)
        undo.callback(_end_jobs, running)
        yield running


def _write_configuration(running: Cluster) -> None:
    folder, network, (controller, *ports) = running.folder, running.network, _free_ports(running.nodes + 1)
    address = network.address if network else "127.0.0.1"
    text = _CONFIGURATION.format(
        host=_host(), address=address, port=controller, user=psutil.Process().username(), folder=folder
    )
    for number, port in enumerate(ports, start=1):
        name, at = (f"node{number}", network.node_address(number)) if network else (_host(), address)
        text += f"NodeName=node{number} NodeHostname={name} NodeAddr={at} Port={port} {_SHAPE} State=UNKNOWN\n"
    text += f"PartitionName=test Nodes=node[1-{running.nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"
    running.configuration.write_text(text)
    # Without this slurmd refuses to start where /sys/fs/cgroup is not mounted, as in plain containers and namespaces.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/no-cgroup\n")
    for number in range(8):  # slurmd counts only GPUs that have a file
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    if network is not None:
        (folder / "hosts").write_text(network.hosts())


def _start_munge(running: Cluster) -> None:
    """With a key and a socket of its own: the machine's are not touched."""
    folder = running.folder
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    files = {"key-file": "munge.key", "socket": "munge/socket", "pid-file": "pid/munged", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    _daemon(running, "munged", *options, f"--log-file={folder}/log/munged.log", "--force")


def _start_node(running: Cluster, number: int) -> None:
    slurmd = ("slurmd", "-N", f"node{number}", "-f", str(running.configuration))
    if running.network is None:
        return _daemon(running, *slurmd)
    inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
    enter = ("nsenter", f"--net=/run/netns/{running.network.namespace(number)}", "unshare", "--uts", "--mount")
    own = ("bash", "-c", inside, "_", str(running.folder / "hosts"), f"node{number}")
    return _daemon(running, *enter, *own, *slurmd)


def _daemon(running: Cluster, *words: str) -> None:
    """Start a daemon, which returns when it is in the background, holding none of our pipes."""
    with (running.folder / "log" / "starting").open("w+") as told:
        done = subprocess.run(
            words, env=running.environment(), stdin=subprocess.DEVNULL, stdout=told, stderr=told, timeout=30
        )
        told.seek(0)
        assert done.returncode == 0, f"{words}:\n{told.read()}"


def _wait_until_idle(running: Cluster, timeout: float = 15) -> None:
    give_up = time.monotonic() + timeout
    while running.command("sinfo", "-h", "-N", "-o", "%t", check=False).split() != ["idle"] * running.nodes:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted((running.folder / "log").iterdir()))
        assert time.monotonic() < give_up, f"the nodes did not become idle:\n{logs}"
        time.sleep(0.05)


def _end_jobs(running: Cluster, timeout: float = 15) -> None:
    """Cancel all jobs and wait until the nodes have let go of them."""
    give_up = time.monotonic() + timeout
    running.command("scancel", "-u", psutil.Process().username(), check=False)
    while running.command("squeue", "-h", check=False).strip() and time.monotonic() < give_up:
        time.sleep(0.1)


def _stop_nodes(running: Cluster) -> None:
    """Stop the nodes' daemons, then job steps that a lost node may still run: those that write to our logs (they write
    their title over their environment)."""
    for number in range(1, running.nodes + 1):
        _stop(running.folder / "pid" / f"slurmd-node{number}")
    for process in psutil.process_iter(["name"]):
        if process.info["name"].startswith("slurmstepd") and _writes_below(process, running.folder / "log"):
            with suppress(psutil.NoSuchProcess):  # it may be ending by itself
                for child in [*process.children(recursive=True), process]:
                    _kill(child)


def _stop(pid_file: Path, timeout: float = 5) -> None:
    """TERM, and KILL after `timeout`, by a pid file; never a process whose program is another one by now."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        if process.name() != pid_file.name.partition("-")[0]:
            return
        process.terminate()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return
    if not _is_over_within(process, timeout):
        _kill(process)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
    assert _is_over_within(process, 5), f"{process} does not die"


def _is_over_within(process: psutil.Process, timeout: float) -> bool:
    """Daemons are children of init, which may take seconds to reap them: a zombie is over."""
    give_up = time.monotonic() + timeout
    while time.monotonic() < give_up:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def _writes_below(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(Path(file.path).is_relative_to(folder) for file in process.open_files())
    except (psutil.Error, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on, below those that the kernel hands out to clients."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            port = random.randrange(20000, 32000)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            ports.append(port)
        return ports


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env={**os.environ, "PATH": _path()})
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _path() -> str:
    return os.pathsep.join([str(BIN), os.environ.get("PATH", "/usr/bin:/bin"), *_SYSTEM_FOLDERS])

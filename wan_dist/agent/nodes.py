"""The nodes of a run that `wan-dist` starts: which one this is, and the store in which their agents meet.

One agent per node. Node 0 receives the others at head:port, and serves a key-value store at a port that it tells them,
which torchrun's static rendezvous and the ranks then use as well; a run on one node has one of its own.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from wan_dist.agent.line import Line
from wan_dist.agent.presence import Reception, Visit
from wan_dist.config.schema import LaunchConfig
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.topology import SlurmStep

DEFAULT_PORT = 29500  # torchrun's own
# Slurm jobs may share their first node, so that each has a port by its number; below the kernel's ephemeral ports.
_SLURM_PORTS = (20000, 12000)
_LOOPBACK = "127.0.0.1"
_MEET_S = 600.0  # people type at several terminals; Slurm starts a step's tasks together
_ANSWER_S = 30.0  # a store that is there answers at once
_HEARD_S = 5.0  # the others leave without a word only where they are refused
_TELL_S = 5.0  # of waiting, before the user is told for whom
_NODE_0_LEFT = "node 0 left before the ranks were started; its own output says why"
_TYPED = re.compile(r"launch\.(nodes|node_rank|head|port)=([\w.:\-]+)")
_POLL_S = 0.05  # waiting inside the store's own calls would leave signals unheard


@dataclass(frozen=True)
class Node:
    """This node: `rank` of `count`. head, port: where node 0 receives the others; port 0 is any that is free."""

    rank: int = 0
    count: int = 1
    head: str = _LOOPBACK
    port: int = 0


def find_node(launch: LaunchConfig, step: SlurmStep | None, address_of: Callable[[str], str]) -> Node:
    """Which node this is, by `launch.*` or as a task of `srun`. address_of: of the first host of a Slurm host list.

    Raises RefusedError with every reason why the run cannot be laid out over nodes.
    """
    refusals = _slurm_refusals(launch, step) if step is not None else _launch_refusals(launch)
    if refusals:
        raise RefusedError(refusals)
    if step is not None and step.nodes > 1:
        first, count = _SLURM_PORTS
        port = launch.port or first + (step.job * 16 + step.step) % count
        return Node(step.node_rank, step.nodes, launch.head or address_of(step.hosts), port)
    if launch.nodes > 1:
        assert launch.node_rank is not None and launch.head is not None, "refused above"
        return Node(launch.node_rank, launch.nodes, launch.head, launch.port or DEFAULT_PORT)
    return Node(port=launch.port or 0)


def _slurm_refusals(launch: LaunchConfig, step: SlurmStep) -> list[Refusal]:
    found = []
    if step.tasks != step.nodes:
        why = f"srun started {step.tasks} tasks on {step.nodes} node(s); each wan-dist starts all ranks of its node"
        found.append(Refusal("launch", f"{step.tasks} tasks", why, "use srun --ntasks-per-node=1"))
    if launch.nodes not in (1, step.nodes):
        why = f"srun started this on {step.nodes} node(s)"
        found.append(Refusal("launch.nodes", launch.nodes, why, "leave it out under Slurm"))
    if launch.node_rank not in (None, step.node_rank):
        why = f"Slurm says that this is node {step.node_rank}"
        found.append(Refusal("launch.node_rank", launch.node_rank, why, "leave it out under Slurm"))
    return found


def _launch_refusals(launch: LaunchConfig) -> list[Refusal]:
    found = []
    if launch.nodes > 1:
        if launch.node_rank is None:
            why = f"a run on {launch.nodes} nodes needs each node's number"
            found.append(Refusal("launch.node_rank", None, why, f"give 0 to {launch.nodes - 1}, one to each node"))
        if launch.head is None:
            why = f"a run on {launch.nodes} nodes meets at node 0"
            found.append(Refusal("launch.head", None, why, "give node 0's host name or address, on every node"))
    elif launch.head is not None:
        found.append(Refusal("launch.head", launch.head, "this run has one node", "give launch.nodes, or leave it out"))
    if launch.node_rank is not None and not 0 <= launch.node_rank < max(1, launch.nodes):
        why = f"launch.nodes is {launch.nodes}"
        found.append(Refusal("launch.node_rank", launch.node_rank, why, f"use 0 to {max(1, launch.nodes) - 1}"))
    return found


def slurm_address(hosts: str) -> str:
    """The address of the first host of a Slurm host list, as Slurm itself reaches it; its name where Slurm's commands
    do not say."""
    names = _output("scontrol", "show", "hostnames", hosts).split()
    first = names[0] if names else hosts
    words = _output("scontrol", "show", "node", first, "-o").split()
    address = next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), "")
    return address or first


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


class Arrival:
    """This process's coming to a run, as early as its command line says to which: before anything is composed, which
    takes a second. What is composed in the end decides; where that is another node, this arrival is none."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._visit = Visit(node.head, node.port, node.rank) if node.rank else None
        self._reception: Reception | None = None
        if self._visit is None:
            with suppress(OSError):  # which is told where the run is refused for it
                self._reception = Reception(node.port)

    def reception_for(self, node: Node) -> Reception:
        """Raises RefusedError."""
        return self._reception if self._reception is not None and node == self._node else _receive(node)

    def visit_for(self, node: Node) -> Visit:
        """This one's, or a new one."""
        return self._visit if self._visit is not None and node == self._node else Visit(node.head, node.port, node.rank)


def typed_node(arguments: Sequence[str]) -> Node | None:
    """The node that a command line names, of a run on several; None where it does not, or not in so many words."""
    typed = {match[1]: match[2] for match in map(_TYPED.fullmatch, arguments) if match is not None}
    try:
        numbers = {key: int(text) for key, text in typed.items() if key != "head"}
        launch = LaunchConfig(
            nodes=numbers.get("nodes", 1),
            node_rank=numbers.get("node_rank"),
            head=typed.get("head"),
            port=numbers.get("port"),
        )
    except ValueError:
        return None
    return None if launch.nodes < 2 or _launch_refusals(launch) else find_node(launch, None, str)


class Meeting:
    """The store of a run's agents, and what they agree on there before ranks start.

    Raises RefusedError where node 0 cannot serve it, or is not found there; LostNodeError where a node goes away.
    """

    def __init__(self, node: Node, arrival: "Arrival | None" = None) -> None:
        """arrival: this process's, where it has come already."""
        self.node = node
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a peer that leaves is told of by us, once
        self._reception: Reception | None = None
        if node.count == 1:
            self.store = _open_store(node, node.port)
        elif node.rank == 0:
            self._reception = arrival.reception_for(node) if arrival is not None else _receive(node)
            self.store = _open_store(node, 0)
            self._reception.tell(self.store.port)
        else:
            visit = arrival.visit_for(node) if arrival is not None else Visit(node.head, node.port, node.rank)
            _wait_for_node_0(node, visit)
            self.store = _open_store(node, _store_port(node, visit), visit)
        me = f"{socket.gethostname()}, process {os.getpid()}"
        other = self.store.compare_set(f"wan_dist/node/{node.rank}", "", me).decode()
        if other != me:
            why = f"another wan-dist has that number ({other})"
            raise RefusedError([Refusal("launch.node_rank", node.rank, why, "give each node a number of its own")])
        self.store_port: int = self.store.port
        self.port = node.port if self._reception is None else self._reception.port
        self.line = Line(self.store, node.rank, node.count)
        self._job = 0

    def first_says(self, word: str) -> str:
        """Node 0's word, on every node; each call begins another job."""
        self._job += 1
        self.line.begin(self._job)
        if self.node.count == 1:
            return word
        key = f"wan_dist/first/{self._job}"
        if self.node.rank == 0:
            self.store.set(key, word)
        return self._wait_for(key, 0)

    def answer(self, mine: dict[str, Any]) -> None:
        """What this node has to say of the present job."""
        self.store.set(self._answer_key(self.node.rank), json.dumps(mine))

    def answers(self) -> list[dict[str, Any]]:
        """What each node has to say of it, in node order; waits until all have. Node 0, with which the store may go,
        returns when the others have heard as well."""
        found = [json.loads(self._wait_for(self._answer_key(node), node)) for node in range(self.node.count)]
        heard = [f"{self._answer_key(node)}/heard" for node in range(1, self.node.count)]
        if self.node.rank != 0:
            self.store.set(heard[self.node.rank - 1], "")
        end = time.monotonic() + _HEARD_S
        while self.node.rank == 0 and not self.store.check(heard) and time.monotonic() < end:
            time.sleep(_POLL_S)
        return found

    def _answer_key(self, node: int) -> str:
        return f"wan_dist/answer/{self._job}/{node}"

    def _wait_for(self, key: str, node: int) -> str:
        """The word that a node leaves under `key`, however long it takes while it lives: it may fetch a checkpoint."""
        told, start = False, time.monotonic()
        try:
            while not self.store.check([key]):
                waited = time.monotonic() - start
                if self.line.lost is not None:
                    raise LostNodeError(self.line.lost)
                if self._reception is not None and (gone := self._reception.gone - self.line.joined):
                    raise LostNodeError(f"node {min(gone)} has left before the ranks were started")
                if waited > _MEET_S and node not in self.line.joined:
                    raise LostNodeError(f"node {node} has not come in {_MEET_S:.0f} s")
                if not told and waited > _TELL_S:
                    print(f"wan-dist: waiting for node {node}", file=sys.stderr, flush=True)
                    told = True
                time.sleep(_POLL_S)
            return self.store.get(key).decode()
        except LostNodeError:
            raise
        except RuntimeError as error:
            raise LostNodeError(_NODE_0_LEFT) from error


def _open_store(node: Node, port: int, visit: Visit | None = None) -> Any:
    """torch's TCPStore, made in a thread: it would not hear signals, and wait for ever where something else answers."""
    from torch import distributed as dist

    made: list[Any] = []

    def make() -> None:
        try:
            made.append(
                dist.TCPStore(
                    node.head,
                    port,
                    is_master=node.rank == 0,
                    wait_for_workers=False,
                    multi_tenant=True,  # torchrun's rendezvous serves the same one
                    timeout=timedelta(seconds=_ANSWER_S),
                )
            )
        except (RuntimeError, ValueError) as error:
            made.append(error)

    threading.Thread(target=make, name="store", daemon=True).start()
    start = time.monotonic()
    while not made and time.monotonic() - start < _ANSWER_S:
        if visit is not None and visit.gone:
            raise LostNodeError(_NODE_0_LEFT)
        time.sleep(_POLL_S / 10)
    if not made:
        _refuse_meeting(node, TimeoutError("something else answers there"))
    if isinstance(made[0], Exception):
        _refuse_meeting(node, made[0])
    return made[0]


class LostNodeError(RuntimeError):
    """A node is gone, and the run with it."""


def _receive(node: Node) -> Reception:
    try:
        return Reception(node.port)
    except OSError as error:
        _refuse_meeting(node, error)


def _wait_for_node_0(node: Node, visit: Visit) -> None:
    told, start = False, time.monotonic()
    while not visit.connected:
        waited, error = time.monotonic() - start, visit.error
        if error is not None and (waited > _MEET_S or isinstance(error, socket.gaierror)):
            _refuse_meeting(node, error)
        if not told and waited > _TELL_S:
            print(f"wan-dist: waiting for node 0 at {node.head}:{node.port}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_S)


def _store_port(node: Node, visit: Visit) -> int:
    """Where node 0 says that the store is, once it is there."""
    import torch.distributed  # noqa: F401  as node 0 does meanwhile

    start = time.monotonic()
    while visit.store_port is None:
        late = visit.greeted is None and time.monotonic() - start > _ANSWER_S
        if late or visit.greeted is False:
            _refuse_meeting(node, TimeoutError("something else answers there"))
        if visit.gone:
            raise LostNodeError(_NODE_0_LEFT)
        time.sleep(_POLL_S / 10)
    return visit.store_port


def _refuse_meeting(node: Node, error: Exception) -> NoReturn:
    where, reason = f"{node.head}:{node.port}", str(error).splitlines()[0]
    why, remedy = f"no node 0 at {where} ({reason})", "start node 0; check launch.head and launch.port"
    if node.rank == 0:
        why = f"this node cannot serve {where} ({reason})"
        remedy = "use node 0's own address and a free launch.port; another wan-dist may be node 0 already"
    raise RefusedError([Refusal("launch.head", node.head, why, remedy)]) from error


def interface_towards(head: str, port: int) -> str | None:
    """The network interface whose address this host uses to reach `head`, or None where that cannot be told.

    gloo by itself takes the address of the host's own name, which on many systems is a loopback one.
    """
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of datagrams: nothing is sent
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == mine for entry in addresses):
            return name
    return None

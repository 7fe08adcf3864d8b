"""Which nodes have come to a run, before there is a store to tell it in: torch, which serves that, takes seconds to
import, and a node that dies meanwhile is to be missed at once.

Node 0 listens at head:port; the others connect, say which they are, are greeted, stay connected, and are told the port
of the store when there is one. The end of a process, however it comes, ends its connection. Imports no torch.
"""

import socket
import threading
import time
from contextlib import suppress

_GREETING = "wan_dist"
_LINE_BYTES = 64  # at most, of what either end says
_CONNECT_S, _AGAIN_S = 2.0, 0.05
_BACKLOG = 1024


class Reception:
    """Node 0's end, for as long as its process lives. Raises OSError where the port cannot be served."""

    def __init__(self, port: int) -> None:
        self._here: list[tuple[int, socket.socket]] = []
        self._came: set[int] = set()
        self._store_port: int | None = None
        self._changing = threading.Lock()  # guards the three
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._receive, name="reception", daemon=True).start()

    @property
    def gone(self) -> set[int]:
        """The nodes that had come and have ended; a number that was given twice by mistake counts while one lives."""
        with self._changing:
            return self._came - {node for node, _ in self._here}

    def tell(self, store_port: int) -> None:
        """Where the store is: to those who are here, and who come."""
        with self._changing:
            self._store_port = store_port
            for _, connection in self._here:
                _say(connection, str(store_port))

    def _receive(self) -> None:
        while True:
            with suppress(OSError):  # of one that has left already
                connection, _ = self._listener.accept()
                threading.Thread(target=self._attend, args=(connection,), name="presence", daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        with connection:
            try:
                node = int(_heard(connection))
            except (OSError, ValueError):  # a stranger
                return
            here = (node, connection)
            with self._changing:
                self._here.append(here)
                self._came.add(node)
                _say(connection, _GREETING)
                if self._store_port is not None:
                    _say(connection, str(self._store_port))
            with suppress(OSError):
                connection.recv(1)  # nothing comes but the end
            with self._changing:
                self._here.remove(here)


class Visit:
    """Another node's end, for as long as its process lives; it goes on trying until node 0 is there.

    connected: whether something answers. error: of the last attempt. greeted: whether it is node 0 that answers (None:
    not yet). store_port: what it has told. gone: whether it has ended.
    """

    def __init__(self, head: str, port: int, node: int) -> None:
        self.connected = self.gone = False
        self.error: OSError | None = None
        self.greeted: bool | None = None
        self.store_port: int | None = None
        self._address, self._node = (head, port), node
        threading.Thread(target=self._attend, name="presence", daemon=True).start()

    def _attend(self) -> None:
        while not self.connected:
            try:
                self._connection = socket.create_connection(self._address, timeout=_CONNECT_S)
                self.connected = True
            except OSError as error:
                self.error = error
                time.sleep(_AGAIN_S)
        self._connection.settimeout(None)
        _say(self._connection, str(self._node))
        with suppress(OSError, ValueError):
            if line := _heard(self._connection):
                self.greeted = line == _GREETING
            if self.greeted:
                self.store_port = int(_heard(self._connection))
                self._connection.recv(1)  # nothing comes but the end
        self.gone = True


def _say(connection: socket.socket, line: str) -> None:
    with suppress(OSError):  # it has ended, which is noticed where it is listened to
        connection.sendall(f"{line}\n".encode())


def _heard(connection: socket.socket) -> str:
    """One line; empty where the other end is gone."""
    heard = b""
    while not heard.endswith(b"\n") and len(heard) < _LINE_BYTES:
        more = connection.recv(1)
        if not more:
            return ""
        heard += more
    return heard.decode("ascii", "replace").strip()


def _listen(port: int) -> socket.socket:
    """On all addresses, as torch's store does: node 0's name may stand for another one here than elsewhere."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)

"""Which nodes have come to a run, before there is a store to tell it in: torch, which serves that, takes seconds to
import, and a node that dies meanwhile is to be missed at once.

Node 0 listens where the store will be, the others connect and stay connected: the end of a process, however it comes,
ends its connection. When torch is there, its store takes over the listening socket. Imports no torch.
"""

import socket
import threading
from collections import Counter
from contextlib import suppress

_GREETING = b"wan_dist\n"  # node 0 speaks first, which torch's store never does
_GREETED_S = 1.0
_LOOK_S = 0.05
_BACKLOG = 1024


class Reception:
    """Node 0's end. gone: the nodes that had come and have ended. Raises OSError where the port cannot be served."""

    def __init__(self, port: int) -> None:
        self.gone: set[int] = set()
        self._here: Counter[int] = Counter()  # connections by node: a number may be given twice by mistake
        self._changing = threading.Lock()  # guards the two
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="reception", daemon=True)
        self._thread.start()

    def hand_over(self) -> int:
        """Receive nobody any more; returns the descriptor of the listening socket, which is the caller's from now on.
        Those who have come are still watched."""
        self._closed.set()
        self._thread.join()
        return self._listener.detach()

    def _receive(self) -> None:
        self._listener.settimeout(_LOOK_S)
        while not self._closed.is_set():
            with suppress(TimeoutError, ConnectionError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._attend, args=(connection,), name="presence", daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):  # a stranger
            connection.settimeout(None)
            connection.sendall(_GREETING)
            node = int(connection.recv(16))
            with self._changing:
                self._here[node] += 1
                self.gone.discard(node)
            with suppress(OSError):
                connection.recv(1)  # nothing comes but the end
            with self._changing:
                self._here[node] -= 1
                if not self._here[node]:
                    self.gone.add(node)


class Visit:
    """Another node's end, kept open for as long as its process lives. gone: whether node 0 has ended."""

    def __init__(self, connection: socket.socket, node: int) -> None:
        self.gone = False
        self._connection = connection
        connection.settimeout(_GREETED_S)
        try:
            connection.recv(len(_GREETING))
            connection.sendall(str(node).encode())
        except TimeoutError:  # the store is there already, and knows who comes
            connection.close()
            return
        except OSError:
            self.gone = True
            return
        connection.settimeout(None)
        threading.Thread(target=self._wait, name="presence", daemon=True).start()

    def _wait(self) -> None:
        with suppress(OSError):
            self._connection.recv(1)
        self.gone = True


def _listen(port: int) -> socket.socket:
    """On all addresses, as torch's store does: node 0's name may stand for another one here than elsewhere."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)

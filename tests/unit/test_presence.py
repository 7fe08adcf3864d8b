"""That a node which has come to a run is missed when it ends, before there is a store."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from wan_dist.agent.presence import Reception, Visit

NODE_0 = """
import time
from wan_dist.agent.presence import Reception
print(Reception(0).port, flush=True)
time.sleep(60)
"""
ANOTHER = """
import sys, time
from wan_dist.agent.presence import Visit
visit = Visit("127.0.0.1", int(sys.argv[1]), int(sys.argv[2]))
time.sleep(60)
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def comes_true(condition, within: float = 10) -> bool:
    give_up = time.monotonic() + within
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def here(reception: Reception) -> list[int]:
    return sorted(node for node, _ in reception._here)


def visit(port: int, node: int) -> Visit:
    return Visit("127.0.0.1", port, node)


def test_a_node_that_is_killed_is_missed_before_and_after_there_is_a_store():
    reception = Reception(0)
    others = [start(ANOTHER, str(reception.port), str(node)) for node in (1, 2)]
    assert comes_true(lambda: here(reception) == [1, 2]) and reception.gone == set()
    for node, other in enumerate(others, start=1):
        other.send_signal(signal.SIGKILL)
        assert comes_true(lambda node=node: node in reception.gone)
        other.wait()
        reception.tell(29501)


def test_node_0_that_is_killed_is_missed():
    node_0 = start(NODE_0)
    mine = visit(int(node_0.stdout.readline()), 1)
    assert comes_true(lambda: mine.greeted) and not mine.gone
    node_0.kill()
    assert comes_true(lambda: mine.gone) and mine.store_port is None
    node_0.wait()


def test_the_store_is_told_to_those_who_are_here_and_who_come():
    reception = Reception(0)
    early = visit(reception.port, 1)
    assert comes_true(lambda: early.greeted) and early.store_port is None
    reception.tell(29501)
    late = visit(reception.port, 2)
    assert comes_true(lambda: early.store_port == late.store_port == 29501)
    assert reception.gone == set() and not early.gone and not late.gone


def test_a_number_given_twice_is_missed_when_both_are_gone():
    reception = Reception(0)
    first, second = visit(reception.port, 1), visit(reception.port, 1)
    assert comes_true(lambda: here(reception) == [1, 1])
    first._connection.shutdown(socket.SHUT_RDWR)
    assert comes_true(lambda: here(reception) == [1]) and reception.gone == set()
    second._connection.shutdown(socket.SHUT_RDWR)
    assert comes_true(lambda: reception.gone == {1})


def test_strangers_are_nobody_at_either_end():
    reception = Reception(0)
    with socket.create_connection(("127.0.0.1", reception.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(10)
        with suppress(ConnectionResetError):  # closed with our words unread
            assert stranger.recv(100) == b""
    assert reception.gone == set() and here(reception) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = visit(server.getsockname()[1], 1)
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        assert comes_true(lambda: mine.greeted is False)
        connection.close()


def test_another_node_may_come_first():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    early = visit(port, 1)
    assert comes_true(lambda: early.error is not None) and not early.connected
    reception = Reception(port)
    assert comes_true(lambda: early.greeted) and here(reception) == [1]

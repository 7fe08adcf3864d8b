"""That a node which has come to a run is missed when it ends, before there is a store."""

import os
import signal
import socket
import subprocess
import sys
import time

from wan_dist.agent.presence import Reception, Visit

NODE_0 = """
import time
from wan_dist.agent.presence import Reception
print(Reception(0).port, flush=True)
time.sleep(60)
"""
ANOTHER = """
import socket, sys, time
from wan_dist.agent.presence import Visit
visit = Visit(socket.create_connection(("127.0.0.1", int(sys.argv[1]))), int(sys.argv[2]))
print("here", flush=True)
time.sleep(60)
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def comes_true(condition, within: float = 10) -> bool:
    give_up = time.monotonic() + within
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def visit(port: int, node: int) -> Visit:
    return Visit(socket.create_connection(("127.0.0.1", port)), node)


def test_a_node_that_is_killed_is_missed_also_once_the_store_has_taken_over():
    reception = Reception(0)
    others = [start(ANOTHER, str(reception.port), str(node)) for node in (1, 2)]
    assert [other.stdout.readline() for other in others] == ["here\n"] * 2
    assert comes_true(lambda: reception._here.total() == 2) and reception.gone == set()
    os.close(reception.hand_over())
    for other, node in zip(others, (1, 2), strict=True):
        other.send_signal(signal.SIGKILL)
        assert comes_true(lambda node=node: node in reception.gone)
        other.wait()


def test_node_0_that_is_killed_is_missed():
    node_0 = start(NODE_0)
    mine = visit(int(node_0.stdout.readline()), 1)
    assert not mine.gone
    node_0.kill()
    assert comes_true(lambda: mine.gone)
    node_0.wait()


def test_a_number_given_twice_is_missed_when_both_are_gone():
    reception = Reception(0)
    first, second = visit(reception.port, 1), visit(reception.port, 1)
    assert comes_true(lambda: reception._here[1] == 2)
    first._connection.shutdown(socket.SHUT_RDWR)
    assert comes_true(lambda: reception._here[1] == 1) and reception.gone == set()
    second._connection.shutdown(socket.SHUT_RDWR)
    assert comes_true(lambda: reception.gone == {1})
    os.close(reception.hand_over())


def test_who_comes_late_finds_the_store_and_is_not_kept():
    """The store does not greet: here it is a socket that nobody serves."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        late = visit(store.getsockname()[1], 1)
    assert not late.gone and late._connection.fileno() == -1


def test_strangers_are_nobody():
    reception = Reception(0)
    with socket.create_connection(("127.0.0.1", reception.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b"wan_dist\n"
    time.sleep(0.1)
    assert reception.gone == set() and reception._here.total() == 0
    os.close(reception.hand_over())

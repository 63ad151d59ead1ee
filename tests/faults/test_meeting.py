"""Strangers where the nodes of a job meet: silent ones, many, false ones."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from dcft_dist.cluster.node_check import meet

from ..cluster.test_render import free_port, meet_all


def strangers(port: int, number: int, say: bytes, kept: list[socket.socket]) -> None:
    """They connect first, and stay."""
    while len(kept) < number:
        try:
            kept.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            kept[-1].sendall(say)
        except OSError:
            time.sleep(0.01)


@pytest.mark.parametrize(("number", "say"), [(1, b""), (300, b""), (5, b"b"), (5, b"x" * 32 + b"b\n"), (5, b"y" * 5000)])
def test_strangers_at_the_meeting(number: int, say: bytes) -> None:
    """They say nothing, or the name of a node: they keep nobody waiting, and take nobody's place."""
    port, kept = free_port(), list[socket.socket]()
    crowd = threading.Thread(target=strangers, args=(port, number, say, kept), daemon=True)
    crowd.start()
    began = time.monotonic()
    assert meet_all(["a", "b", "c"], ["a", "b", "c"], port, 10.0) == {"a": "", "b": "", "c": ""}
    assert time.monotonic() - began < 9
    for connection in kept:
        connection.close()


def test_a_stranger_takes_nobodys_place() -> None:
    port, kept = free_port(), list[socket.socket]()
    threading.Thread(target=strangers, args=(port, 5, b"x" * 32 + b"b\n", kept), daemon=True).start()
    found = meet("a", "127.0.0.1", port, ["a", "b"], 2.0, "a secret")
    assert found == f"a: no contact from b on 127.0.0.1 port {port} within 2 s"
    for connection in kept:
        connection.close()


def test_strangers_that_break_off() -> None:
    """Six hundred connect and reset at once, before the second node comes. The head still hears it."""
    port, found = free_port(), dict[str, str]()
    head = threading.Thread(target=lambda: found.update(a=meet("a", "127.0.0.1", port, ["a", "b"], 20.0, "a secret")))
    head.start()
    broken, end = 0, time.monotonic() + 8
    while broken < 600 and time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            broken += 1
        except OSError:
            time.sleep(0.01)
    assert meet("b", "127.0.0.1", port, ["a", "b"], 10.0, "a secret") == ""
    head.join()
    assert found == {"a": ""}


def test_another_job_at_the_meeting() -> None:
    port = free_port()
    found = meet_all(["a", "b"], ["a", "b"], port, 2.0, {"b": "another secret"})
    assert "no contact from b" in found["a"] and "cannot reach the head node a" in found["b"]


def test_a_head_that_does_not_know_the_secret() -> None:
    port = free_port()
    server = socket.create_server(("127.0.0.1", port))

    def pretend() -> None:
        connection, _ = server.accept()
        connection.sendall(b"0" * 16)
        connection.recv(400)
        connection.sendall(b"go" + b"0" * 32)

    threading.Thread(target=pretend, daemon=True).start()
    assert "another program answers there" in meet("b", "127.0.0.1", port, ["a", "b"], 3.0, "a secret")
    server.close()

"""Checks, before the ranks start, that every node can reach the head node. An error names the nodes that cannot.

Run `python -m dcft_dist.cluster.node_check ADDRESS PORT SECONDS NODE...` once on each node. The first NODE listens at
ADDRESS; all nodes connect and say their names. Only sockets are needed, and the port is free for torchrun afterwards.

The job's secret, in the environment variable DCFT_SECRET, keeps others out. The head sends a random number. A node answers
with its name and a code (HMAC-SHA256 of number and name); the head answers with a code too. Whoever cannot make the codes is
not counted, and whoever says nothing keeps nobody waiting.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

_CODE, _NONCE, _LIMIT = 32, 16, 400  # bytes of a code, of the random number, and of the longest message
_AT_ONCE = 256  # connections of nodes that have not said their names yet; the oldest gives way to a new one


def meet(me: str, address: str, port: int, nodes: Sequence[str], timeout_s: float, secret: str) -> str:
    """Runs the check on one node. Every node calls it at about the same time.

    Args:
        me: name of this node, as in `nodes`.
        address: address of the head node.
        port: port to listen on and to connect to.
        nodes: names of all nodes, the head node first.
        timeout_s: seconds until a node gives up.
        secret: of the job, the same on every node.

    Returns:
        The problem on this node, in words; empty if there is none.
    """
    end, key = time.monotonic() + timeout_s, secret.encode()
    missing: set[str] = set(nodes) if me == nodes[0] else set()
    server = None
    if missing:
        try:
            server = _server(address, port)
        except OSError as error:
            return f"{me}: port {port} cannot be opened here: {os.strerror(error.errno or 0)}"
        listener = threading.Thread(target=_Listener(server, missing, key).run, args=(end,), daemon=True)
        listener.start()
    problem = _knock(me, address, port, end, key)
    if server is not None:
        listener.join()
        server.close()
        if missing:
            return f"{me}: no contact from {', '.join(sorted(missing))} on {address} port {port} within {timeout_s:g} s"
    return problem and f"{me}: cannot reach the head node {nodes[0]} at {address} port {port} ({problem})"


def _server(address: str, port: int) -> socket.socket:
    """Listens at the head's own address. Everywhere if that is a loopback, which the other nodes could not reach."""
    with suppress(OSError):
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if not str(place[0]).startswith(("127.", "::1")):
            return socket.create_server(place[:2], family=family, backlog=_AT_ONCE)
    return socket.create_server(("", port), backlog=_AT_ONCE)


class _Listener:
    """The head's side: talks to many connections at once, and removes the names of nodes that know the secret."""

    def __init__(self, server: socket.socket, missing: set[str], key: bytes) -> None:
        self._server, self._missing, self._key = server, missing, key
        self._nonces: dict[socket.socket, bytes] = {}
        self._heard: dict[socket.socket, bytes] = {}
        self._known: list[socket.socket] = []

    def run(self, end: float) -> None:
        """Until no node is missing, or `end`; then answers the nodes."""
        with selectors.DefaultSelector() as selector:
            self._server.setblocking(False)
            selector.register(self._server, selectors.EVENT_READ)
            while self._missing and (left := end - time.monotonic()) > 0:
                for ready, _ in selector.select(left):
                    with suppress(OSError):
                        if isinstance(ready.fileobj, socket.socket) and ready.fileobj is not self._server:
                            self._hear(ready.fileobj, selector)
                        else:
                            self._greet(selector)
        for connection in self._known:
            self._answer(connection)
        for connection in self._heard:
            connection.close()

    def _greet(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._server.accept()
        if len(self._heard) >= _AT_ONCE:
            self._drop(next(iter(self._heard)), selector)
        nonce = secrets.token_bytes(_NONCE)
        try:
            connection.setblocking(False)
            connection.send(nonce)
        except OSError:  # it has gone again
            connection.close()
            return
        selector.register(connection, selectors.EVENT_READ)
        self._nonces[connection], self._heard[connection] = nonce, b""

    def _hear(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            data = connection.recv(_LIMIT)
        except OSError:
            data = b""
        heard = self._heard[connection] = self._heard[connection] + data
        code, name = heard[:_CODE], heard[_CODE:]
        finished = not data or len(heard) > _LIMIT or name.endswith(b"\n")
        if finished and hmac.compare_digest(code, _code(self._key, self._nonces[connection], name)) and name:
            selector.unregister(connection)
            del self._heard[connection]
            self._missing.discard(name.decode(errors="replace").strip())
            self._known.append(connection)
        elif finished:
            self._drop(connection, selector)

    def _drop(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        selector.unregister(connection)
        connection.close()
        del self._nonces[connection], self._heard[connection]

    def _answer(self, connection: socket.socket) -> None:
        word = b"no" if self._missing else b"go"
        with suppress(OSError):
            connection.settimeout(5.0)
            connection.sendall(word + _code(self._key, self._nonces[connection], word))
            connection.recv(1)  # the other node closes first, so that the port is free at once
        connection.close()


def _code(key: bytes, nonce: bytes, text: bytes) -> bytes:
    return hmac.digest(key, nonce + text, "sha256")


def _knock(me: str, address: str, port: int, end: float, key: bytes) -> str:
    """Says this node's name to the head node; returns the problem, or an empty string."""
    problem, name = "no time left", me.encode() + b"\n"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=left) as connection:
                nonce = _receive(connection, _NONCE)
                connection.sendall(_code(key, nonce, name) + name)
                connection.settimeout(max(end - time.monotonic(), 0.0) + 5.0)
                answer = _receive(connection, 2 + _CODE)
                if not answer:  # dropped among too many others, or not known
                    problem = "whoever answers there does not know this job"
                    time.sleep(0.2)
                    continue
                if not hmac.compare_digest(answer[2:], _code(key, nonce, answer[:2])):
                    return "another program answers there"
                return "" if answer[:2] == b"go" else "other nodes were missing"
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    return problem


def _receive(connection: socket.socket, number: int) -> bytes:
    """Receives exactly `number` bytes; fewer if the other side closes."""
    data = b""
    while len(data) < number and (part := connection.recv(number - len(data))):
        data += part
    return data


def main(arguments: Sequence[str]) -> int:
    """Runs the check with ADDRESS PORT SECONDS NODE...; returns 1 and prints the problem if there is one, else 0."""
    address, port, timeout_s, *nodes = arguments
    me = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problem = meet(me, address, int(port), nodes, float(timeout_s), os.environ.get("DCFT_SECRET", ""))
    if not os.environ.get("DCFT_SECRET") and me == nodes[0]:
        print("dcft: warning: no DCFT_SECRET: any program may take the place of a node", file=sys.stderr, flush=True)
    if problem:
        print(f"dcft: error: {problem}", file=sys.stderr, flush=True)
    return int(bool(problem))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

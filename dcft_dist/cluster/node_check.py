"""Checks, before the ranks start, that every node can reach the head node. An error names the nodes that cannot.

Run `python -m dcft_dist.cluster.node_check ADDRESS PORT SECONDS NODE...` once on each node. The first NODE listens at
ADDRESS; all nodes connect and send their names. Only sockets are needed, and the port is free for torchrun afterwards.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence


def meet(me: str, address: str, port: int, nodes: Sequence[str], timeout_s: float) -> str:
    """Runs the check on one node. Every node calls it at about the same time.

    Args:
        me: name of this node, as in `nodes`.
        address: address of the head node.
        port: port to listen on and to connect to.
        nodes: names of all nodes, the head node first.
        timeout_s: seconds until a node gives up.

    Returns:
        The problem on this node, in words; empty if there is none.
    """
    end = time.monotonic() + timeout_s
    missing: set[str] = set(nodes) if me == nodes[0] else set()
    server = None
    if missing:
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            return f"{me}: port {port} cannot be opened here: {os.strerror(error.errno or 0)}"
        listener = threading.Thread(target=_listen, args=(server, missing, end), daemon=True)
        listener.start()
    problem = _knock(me, address, port, end)
    if server is not None:
        listener.join()
        server.close()
        if missing:
            return f"{me}: no contact from {', '.join(sorted(missing))} on {address} port {port} within {timeout_s:g} s"
    return problem and f"{me}: cannot reach the head node {nodes[0]} at {address} port {port} ({problem})"


def _listen(server: socket.socket, missing: set[str], end: float) -> None:
    """Removes the names that arrive from `missing`. Answers all nodes once none is missing, or at `end`."""
    connections = []
    while missing and (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
            connection.settimeout(max(end - time.monotonic(), 0.1))
            missing.discard(connection.recv(256).decode(errors="replace"))
            connections.append(connection)
        except OSError:
            continue
    for connection in connections:
        try:
            connection.sendall(b"go" if not missing else b"no")
            connection.recv(1)  # the other node closes first, so that the port is free at once
        except OSError:
            pass
        connection.close()


def _knock(me: str, address: str, port: int, end: float) -> str:
    """Sends this node's name to the head node; returns the problem, or an empty string."""
    problem = "no time left"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=left) as connection:
                connection.sendall(me.encode())
                connection.settimeout(max(end - time.monotonic(), 0.0) + 5.0)
                answer = connection.recv(2)
                return {b"go": "", b"no": "other nodes were missing"}.get(answer, "another program answers there")
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    return problem


def main(arguments: Sequence[str]) -> int:
    """Runs the check with ADDRESS PORT SECONDS NODE...; returns 1 and prints the problem if there is one, else 0."""
    address, port, timeout_s, *nodes = arguments
    me = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problem = meet(me, address, int(port), nodes, float(timeout_s))
    if problem:
        print(f"dcft: error: {problem}", file=sys.stderr, flush=True)
    return int(bool(problem))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

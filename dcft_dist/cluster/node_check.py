"""Before the ranks start: can every node reach the head node? An answer with names, instead of a rendezvous that hangs.

`python -m dcft_dist.meet ADDRESS PORT SECONDS NODE...`, once on each node: the first of NODE... listens, all connect and say
who they are. It needs nothing but sockets, and leaves the port free for torchrun.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence


def meet(me: str, address: str, port: int, nodes: Sequence[str], timeout_s: float) -> str:
    """Returns what went wrong on this node, or an empty string."""
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
            return f"{me}: not heard of {', '.join(sorted(missing))} on {address} port {port} within {timeout_s:g} s"
    return problem and f"{me}: cannot reach the head node {nodes[0]} at {address} port {port} ({problem})"


def _listen(server: socket.socket, missing: set[str], end: float) -> None:
    """Takes names off `missing` as they come in; answers all once nobody is missing."""
    guests = []
    while missing and (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            guest, _ = server.accept()
            guest.settimeout(max(end - time.monotonic(), 0.1))
            missing.discard(guest.recv(256).decode(errors="replace"))
            guests.append(guest)
        except OSError:
            continue
    for guest in guests:
        try:
            guest.sendall(b"go" if not missing else b"no")
            guest.recv(1)  # the guest closes first, so that the port is free at once
        except OSError:
            pass
        guest.close()


def _knock(me: str, address: str, port: int, end: float) -> str:
    problem = "no time left"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=left) as line:
                line.sendall(me.encode())
                line.settimeout(max(end - time.monotonic(), 0.0) + 5.0)
                answer = line.recv(2)
                return {b"go": "", b"no": "others were missing"}.get(answer, "something else answers there")
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    return problem


def main(arguments: Sequence[str]) -> int:
    address, port, timeout_s, *nodes = arguments
    me = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problem = meet(me, address, int(port), nodes, float(timeout_s))
    if problem:
        print(f"dcft: error: {problem}", file=sys.stderr, flush=True)
    return int(bool(problem))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

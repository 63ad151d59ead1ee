"""The network interface that gloo uses. Debian lets a host's own name mean 127.0.1.1, which other nodes cannot reach."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def choose_interface() -> str | None:
    """Sets `GLOO_SOCKET_IFNAME` if there are several nodes, it is not set, and this host's name means the host itself.

    Returns:
        The interface that was chosen: the one on the way to `MASTER_ADDR`, or else to the default route. None: gloo chooses.
    """
    several_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < int(os.environ.get("WORLD_SIZE", 1))
    if not several_nodes or "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(_address_of(socket.gethostname())):
        return None
    names = {_address_at(name): name for _, name in socket.if_nameindex()}
    reachable = {address: name for address, name in names.items() if address and not _is_loopback(address)}
    targets = (os.environ.get("MASTER_ADDR", ""), "192.0.2.1")  # an address for documentation: asks for the default route
    ways = [way for target in targets if (way := _own_address_towards(target)) in reachable]
    if not ways and len(reachable) == 1:  # on the node of MASTER_ADDR itself, without a default route
        ways = list(reachable)
    if not ways:
        return None
    os.environ["GLOO_SOCKET_IFNAME"] = reachable[str(ways[0])]
    return os.environ["GLOO_SOCKET_IFNAME"]


def _address_of(host: str) -> str:
    """The IPv4 address of a host by name; empty if it has none."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback


def _own_address_towards(target: str) -> str:
    """The address of this host from which packets to the target go; nothing is sent. Empty if there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect((target, 9))
            return str(asked.getsockname()[0])
    except OSError:
        return ""


def _address_at(interface: str) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:  # it has no IPv4 address
        return ""

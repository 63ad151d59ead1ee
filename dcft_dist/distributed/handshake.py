"""Do all ranks have the same? Compares named facts in one small collective, and names the first that differs.

A rank with another learning rate, other data or other weights trains on without a word: the shapes fit. So ranks exchange
a digest of what each has read before they compute.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import MismatchError
from . import collectives

Facts = Mapping[str, str]  # name of a thing -> its value, or a digest of it that begins with `#`


def digest_of(*parts: object) -> str:
    """A digest for `Facts`: `#` and 32 hexadecimal digits, of the `repr` of all parts."""
    return "#" + hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def require_equal(facts: Facts, what: str) -> None:
    """Compares facts over all ranks. Collective: 8 bytes for each rank, as long as they are equal.

    Args:
        facts: what this rank has; the first that differs is named, so put causes before effects.
        what: what the facts are about, for messages: "configuration".

    Raises:
        MismatchError: the ranks have different facts. Every rank raises the same message, which names the first rank that
            differs from the majority, and the first fact that does.
    """
    own = int.from_bytes(hashlib.sha256(json.dumps(list(facts.items())).encode()).digest()[:7], "little")
    digests = [digest for (digest,) in collectives.all_gather_ints([own], what=f"comparison of the {what}")]
    if len(set(digests)) == 1:
        return
    usual = digests.index(Counter(digests).most_common(1)[0][0])
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[usual])
    theirs = json.loads(collectives.broadcast_text(json.dumps(dict(facts)), usual, what=f"{what} of rank {usual}"))
    text = ""
    if collectives.rank() == other:
        key, mine, usual_value = next(differences(facts, theirs))
        text = f"rank {other} on {socket.gethostname()} has another {key} than rank {usual}{_values(mine, usual_value)}"
    raise MismatchError(collectives.broadcast_text(text, other, what=f"{what} of rank {other}"))


def differences(facts: Facts, others: Facts) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields (name, value, other value) of each fact that differs, in the order of `facts`; None: it is missing."""
    for key in {**facts, **others}:
        if facts.get(key) != others.get(key):
            yield key, facts.get(key), others.get(key)


def _values(mine: str | None, theirs: str | None) -> str:
    """The two values for a message; nothing for digests, which would say nothing."""
    if (mine or "").startswith("#") or (theirs or "").startswith("#"):
        return ""
    return f": {'none' if mine is None else mine}, not {'none' if theirs is None else theirs}"


def same_view(files: str) -> tuple[int, int, list[int]]:
    """Groups the ranks that see the same files: those on one host with the same paths. They can share the work. Collective.

    Args:
        files: the paths as this rank sees them, or a digest of them.

    Returns:
        This rank's position in its group, the size of the group, and the group of each rank of the world, numbered in order
        of appearance.
    """
    name = int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {files}".encode()).digest()[:7], "little")
    names = [view for (view,) in collectives.all_gather_ints([name], what="hosts and paths of the data")]
    groups = list(dict.fromkeys(names))
    here = [rank for rank, view in enumerate(names) if view == name]
    return here.index(collectives.rank()), len(here), [groups.index(view) for view in names]

"""The places between start and end of a training that an interpolation by set evaluates: 25 for each family."""

from __future__ import annotations

from ..config.schema import Config

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FAMILIES = ("selected", "random", "diagonal")

Place = tuple[str, float, float]  # family, share of the set, share of the rest


def can_interpolate(config: Config) -> bool:
    """Whether runs with this configuration can be interpolated: all weights move, and the scores are those of the start."""
    return config.method in ("dcft", "full", "equal_displacement") and not config.importance.after_epochs


def places() -> list[Place]:
    """All places to evaluate, each once. Equal shares are the same for every set: they belong to the diagonal."""
    unequal = [(a, b) for a in SHARES for b in SHARES if a != b]
    found: list[Place] = [(family, a, b) for family in FAMILIES[:2] for a, b in unequal]
    number = len(SHARES) ** 2
    return [*found, *(("diagonal", i / (number - 1), i / (number - 1)) for i in range(number))]


def candidates(family: str) -> list[Place]:
    """The 25 places among which a family chooses."""
    shared = [("diagonal", a, a) for a in SHARES]
    return [place for place in places() if place[0] == family or (family != "diagonal" and place in shared)]

"""Old name of `dcft_dist.cluster.node_check`: sbatch files written before the move start it."""

from __future__ import annotations

import sys

from .cluster.node_check import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

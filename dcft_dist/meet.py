"""Former name of `dcft_dist.cluster.node_check`, kept for sbatch files from older versions."""

from __future__ import annotations

import sys

from .cluster.node_check import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

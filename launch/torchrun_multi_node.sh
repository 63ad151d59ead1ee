#!/usr/bin/env bash
# One run over several machines without Slurm. Start it on each machine, at about the same time, with the same HEAD:
#   HEAD=10.0.0.1 NODES=2 launch/torchrun_multi_node.sh CONFIG [--key value ...]
# HEAD: address of one machine; NODES: number of machines; RANKS: ranks on each (default: its GPUs, or two); PORT (29400);
# ID: name of the run, if several runs share a HEAD. runs_dir must be on a file system that all machines share.
set -euo pipefail
if [ $# = 0 ] || [ -z "${HEAD:-}" ] || [ -z "${NODES:-}" ]; then sed -n '2,6p' "$0" | cut -c3-; exit 2; fi
. "$(dirname "${BASH_SOURCE[0]}")/interruptible.sh"
python=${DCFT_PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
"$python" -m dcft_dist.cli check "$@" --ranks $((NODES * ranks))
# Is HEAD an address of this machine? Only then can a socket bind to it. torchrun itself would compare host names.
here=0
"$python" -c 'import socket, sys; socket.create_server((sys.argv[1], 0))' "$HEAD" 2>/dev/null && here=1
interruptible "$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$ranks" --rdzv-id "${ID:-dcft}" \
    --rdzv-backend c10d --rdzv-conf is_host="$here" --rdzv-endpoint "$HEAD:${PORT:-29400}" -m dcft_dist.cli train "$@"

"""The jobs from which `dcft slurm-files` renders files in slurm/."""

from __future__ import annotations

from .job import Job
from .render import shell_part

_USAGE = (
    "Submit from a folder that all nodes share, with an environment active that has dcft_dist; partition, account, time by",
    "options of sbatch or SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT; GPUs by --gpus-per-node (docs/clusters.md).",
    "Warned of its end or of preemption, or after a node has failed, the job goes back into the queue and then goes on.",
)


FILES: dict[str, Job] = {
    "single_node.sbatch": Job(
        title=(
            "One run on one node:",
            "  sbatch --gpus-per-node 4 slurm/single_node.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
    ),
    "multi_node_fsdp2.sbatch": Job(
        title=(
            "One run over several nodes under FSDP2:",
            "  sbatch --nodes 4 --gpus-per-node 8 slurm/multi_node_fsdp2.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        nodes=2,
        overrides=("--engine", "fsdp2"),
    ),
    "multi_node_zero3.sbatch": Job(
        title=(
            "One run over several nodes under DeepSpeed ZeRO-3:",
            "  sbatch --nodes 4 --gpus-per-node 8 slurm/multi_node_zero3.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        nodes=2,
        overrides=("--engine", "deepspeed", "--sharding.zero_stage", "3"),
    ),
    "sweep.sbatch": Job(
        title=(
            "Many runs, seeds x fractions x factors, one array task each (on one node, or on --nodes):",
            '  DCFT_SEEDS="0 1 2" DCFT_FRACTIONS="0.05 0.1" DCFT_FACTORS="0 0.1 1" \\',
            "      sbatch --array=0-17 --gpus-per-node 4 slurm/sweep.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        array="0-3",
        before=tuple(shell_part("sweep.sh").splitlines()),
    ),
}

"""Jobs on a cluster: sbatch files, submitit and torchrun from one description of a job.

`render_sbatch(job, site)` (in `cluster.render`) writes an sbatch file that runs by itself.
"""

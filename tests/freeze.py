"""Imported last by the fork server of `ranks`: reads what all ranks read, and keeps garbage collection off what is there.

DeepSpeed collects garbage whenever it is set up, which took two seconds over all that had been imported.
"""

import gc

from dcft_dist.config.toml import load_config
from dcft_dist.data.tasks import load_task

load_task(load_config("icd.toml"))  # keeps the parsed list of codes: a third of a second
gc.collect()
gc.freeze()

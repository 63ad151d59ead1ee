"""Imported last by the fork server of `ranks`: garbage collection leaves alone what is there then.

DeepSpeed collects garbage whenever it is set up, which took two seconds over all that had been imported.
"""

import gc

gc.collect()
gc.freeze()

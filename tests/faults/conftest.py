"""The full product takes half an hour, so only `tests/run.sh --faults` collects it."""

from .harness import ALL

collect_ignore = [] if ALL else ["test_product.py", "test_long_fuzz.py"]

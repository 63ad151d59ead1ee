"""What a run would need and do, before it takes a GPU hour.

`plan(request)` (in `planning.memory`) returns the memory and traffic of each rank.
"""

"""Plans before a run: memory and traffic of each rank (`dcft plan`), and the role of each weight (`dcft inspect`).

`forecast(request)` (in `planning.memory`) returns the memory and traffic of the rank with the largest shards.
"""

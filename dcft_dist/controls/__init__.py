"""Controls that DCFT is compared with: random sets, shorter steps, a pull to the start, and the removal check.

`control_set(model, scores, top, "random_magnitude", seed)` builds a random set that matches the selected set `top`.
"""

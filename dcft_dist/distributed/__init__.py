"""Ranks and collectives. An error of a collective names the ranks that are missing.

`with joined_world(timeout_s=600.0) as world:` joins the process group that torchrun described.
"""

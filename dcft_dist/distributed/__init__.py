"""Ranks and collectives: who takes part, what is sent, and which rank is missing when a collective fails.

`with joined_world(timeout_s=600.0) as world:` joins the process group that torchrun described.
"""

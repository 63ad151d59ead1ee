"""Runs a program and leaves by `os._exit`: gloo may abort one whose interpreter shuts down (pytorch issue 190489)."""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

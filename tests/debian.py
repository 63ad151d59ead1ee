"""Debian packages that tests need, installed by one worker at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path


def apt_install(*packages: str) -> str:
    """Returns what went wrong, or nothing. No daemon of the packages is started."""
    options = ["-o", "DPkg::Lock::Timeout=120", "-y", "-qq", "--no-install-recommends"]
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    with (Path(tempfile.gettempdir()) / "dcft-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mine = not policy.exists()
        if mine:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            for command in (["update", "-qq"], [*options, "install", *packages]):
                done = subprocess.run(["apt-get", *command], capture_output=True, text=True, env=quiet)
            return "" if done.returncode == 0 else f"apt-get install {' '.join(packages)} failed: {done.stderr[-500:]}"
        finally:
            if mine:
                policy.unlink()

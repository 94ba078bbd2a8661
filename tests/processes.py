"""Python in a process of its own, which finds this package and these tests wherever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMAND = ("-m", "ood_fast")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND)


def environment(first: str | Path = HERE.parent, **more: str) -> dict[str, str]:
    """Of a process that looks for modules in `first` before all others."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    path = os.pathsep.join(map(str, (first, HERE.parent, HERE)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **loopback, **more}


def python(*command: str, first: str | Path = HERE.parent, **more: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments and variables; TimeoutExpired if it hangs."""
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment(first, **more), timeout=120
    )

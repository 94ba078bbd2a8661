"""Python in a process of its own, which finds this package and these tests wherever it runs.

To import torch takes seconds, most of what such a process does. So there is `forked`: one process, the server, has
imported what others than this package bring, and those that are asked for are forked from it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from importlib import import_module, util
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND = ("-m", "ood_fast")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND)
TIMEOUT = 120.0  # seconds
IMPORTED = ("torch._dynamo", "torchvision", "sklearn.datasets", "rich.progress", "safetensors.torch")


def environment(first: str | Path = HERE.parent, **more: str) -> dict[str, str]:
    """Of a process that looks for modules in `first` before all others."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    path = os.pathsep.join(map(str, (first, HERE.parent, HERE)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **loopback, **more}


def python(
    *command: str, first: str | Path = HERE.parent, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and variables; TimeoutExpired if it hangs."""
    given: dict[str, Any] = {"env": environment(first, **more), "cwd": cwd, "timeout": TIMEOUT}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **given)


def forked(
    *command: str, processes: int = 1, folder: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """As `python`, in a folder; with 2 `processes` as many, under the agent of torchrun."""
    command = tuple(map(str, command))
    if sys.platform != "linux":
        launcher = () if processes == 1 else TORCHRUN[:-2]
        return python(*launcher, *command, cwd=folder, **more)
    server = _server()
    with tempfile.TemporaryDirectory() as kept:
        written = [f"{kept}/out", f"{kept}/error"]
        request = {"command": command, "variables": environment(**more), "processes": processes, "written": written}
        server.stdin.write(json.dumps({**request, "folder": str(folder or os.getcwd())}).encode() + b"\n")
        pid = int(server.stdout.readline())
        if late := not select.select([server.stdout], [], [], TIMEOUT)[0]:
            os.killpg(pid, signal.SIGKILL)
        code = int(server.stdout.readline())
        out, error = (Path(file).read_text(encoding="utf-8") for file in written)
    if late:
        raise subprocess.TimeoutExpired(command, TIMEOUT, out, error)
    return subprocess.CompletedProcess(command, code, out, error)


@functools.cache
def _server() -> subprocess.Popen:
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    # Without buffers: what is not read yet can be waited for.
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment())
    atexit.register(server.kill)  # its stdin may be open in processes that tests have forked
    return server


# ---- the server, and what is forked from it


def _serve() -> None:
    """Fork for each request, until there is none. A child returns from here when it has been what was asked for."""
    for name in IMPORTED:
        if util.find_spec(name.partition(".")[0]):
            import_module(name)
    gc.collect()
    gc.freeze()  # or each would look through, and so copy, all of it at its end: more than a second
    for line in sys.stdin:
        request = json.loads(line)
        if not (pid := os.fork()):
            return _become(**request)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(command: list[str], variables: dict[str, str], processes: int, written: list[str], folder: str) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, file in enumerate((os.devnull, *written)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.path[0] = folder if command[0] in ("-m", "-c") else str(Path(command[0]).parent)
    if processes == 1:
        return _run(command)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting = {"run_id": str(os.getpid()), "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, processes, max_restarts=0, start_method="fork", **meeting)
    return elastic_launch(config, _run)(command)


def _run(command: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's
    sys.argv = command if command[0] != "-m" else command[1:]
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _serve()

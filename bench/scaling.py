"""How the cost of ELogitNorm grows with n, c, m, distinct predictions and ranks: measured points and a model's line.

    python -m bench.scaling                       # writes scaling.json and scaling.png into bench/results/<machine>/
    python -m bench.scaling --sweeps n c --seconds 0.2
    python -m bench.scaling --docs docs/performance.md    # and puts the tables into that page
    python -m bench.scaling --plot-only           # draws and prints what scaling.json holds

The model has three constants, each measured apart from the points that it is drawn through:

    seconds = calls + products / rate + n c · element

calls: the loss at (8, 200, 16): nothing but calls is left there. products: the flops of matrix products, from
bench/counts.py; rate: a large matrix product on this machine. element: the loss at (256, 1000, 16), less its calls and
products, over n c.
With R ranks, each with c/R classes: the same at c/R, plus the bytes that the collectives send over the bandwidth of an
all-reduce, plus the latency of each of the collectives, all measured within the group. docs/performance.md reads them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_fast

from . import baselines, counts
from .cases import Case
from .measure import ceilings, environment, peak_megabytes
from .ratios import alternate
from .report import milliseconds, slug

Shape = tuple[int, int, int]
BASE = (256, 1000, 768)
PRODUCTS = ("distance_gram", "weight_gradient_table", "weight_gradient_own", "weight_gradient_all")
# Collectives of one step of ood_fast.distributed.elogitnorm with its gradients: those of its `communication_bytes`.
COLLECTIVES = 8
BEGIN, END = "<!-- bench.scaling: begin -->", "<!-- bench.scaling: end -->"


def leaves(shape: Shape, distinct: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """logits and W as leaves, and y; with `distinct` predictions, or as many as there can be."""
    n, c, m = shape
    generator = torch.Generator().manual_seed(0)
    logits, W = torch.randn(n, c, generator=generator), torch.randn(c, m, generator=generator) / m**0.5
    rows = torch.arange(n)
    logits[rows, rows % min(distinct or n, n, c)] = logits.max() + 1
    return logits.requires_grad_(), W.requires_grad_(), torch.randint(c, (n,), generator=generator)


def steps(shape: Shape, distinct: int | None = None) -> dict[str, Callable[[], object]]:
    logits, W, y = leaves(shape, distinct)
    n, _, m = shape
    z, b = torch.randn(n, m).requires_grad_(), torch.zeros(shape[1]).requires_grad_()
    incoming = torch.randn(logits.shape)
    loss, grad = functools.partial(ood_fast.elogitnorm, logits, None, W, None, y), torch.autograd.grad
    return {
        "elogitnorm": lambda: grad(loss(), (logits, W)),
        "detached": lambda: grad(loss(detach_geometry=True), logits),
        "cross-entropy": lambda: grad(F.cross_entropy(logits, y), logits),
        "head": lambda: grad(F.linear(z, W, b), (z, W, b), incoming),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


GENERAL, THIN = (8, 200, 16), (256, 1000, 16)


def constants(seconds: float) -> dict[str, dict[str, float]]:
    """calls, element and rate, for the loss with and without the gradient through the geometry."""
    rate = ceilings("cpu")["fp32"] * 1e9
    at = {shape: alternate(steps(shape), max(seconds, 0.5)) for shape in (GENERAL, THIN)}
    found = {}
    for name in ("elogitnorm", "detached"):
        n, c, _ = THIN
        per_element = at[THIN][name] - at[GENERAL][name] - products(name, THIN) / rate
        found[name] = {
            "calls": at[GENERAL][name],
            "element": max(per_element, 0.0) / (n * c),
            "rate": rate,
        }
    return found


def products(name: str, shape: Shape, distinct: int | None = None) -> float:
    """Flops of the matrix products of a step: on the CPU the table has rows for the distinct predictions only."""
    n, c, m = shape
    u = min(distinct or n, n, c)
    sizes = counts.Sizes.of((u if n < c else n, c, m), torch.float32, u)
    kernels = [k for k in counts.launches("elogitnorm", sizes) if k in PRODUCTS]
    return sum(counts.of(k, sizes).flops for k in (kernels[:1] if name == "detached" else kernels))


def model(constant: dict[str, float], name: str, shape: Shape, distinct: int | None = None) -> float:
    """Seconds of one step, see the module's docstring."""
    n, c, _ = shape
    return constant["calls"] + products(name, shape, distinct) / constant["rate"] + n * c * constant["element"]


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps
# ----------------------------------------------------------------------------------------------------------------------


def sweep(shapes: list[tuple[Shape, int | None]], constant: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    points = []
    for shape, distinct in shapes:
        times = alternate(steps(shape, distinct), seconds)
        line = {name: model(constant[name], name, shape, distinct) for name in constant}
        points.append({"shape": shape, "distinct": distinct, "seconds": times, "model": line})
    return points


def sweeps(base: Shape = BASE) -> dict[str, list[tuple[Shape, int | None]]]:
    n, c, m = base
    return {
        "n": [((n, c, m), None) for n in (16, 64, 256, 1024, 4096)],
        "c": [((n, c, m), None) for c in (10, 30, 100, 300, 1000, 3000, 10_000)],
        "m": [((n, c, m), None) for m in (16, 64, 256, 768, 2048, 4096)],
        "u": [((n, c, 2048), u) for u in (1, 32, 64, 128, 192, 256)],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Ranks
# ----------------------------------------------------------------------------------------------------------------------


def ranks(shape: Shape, counts_of_ranks: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """The class-parallel loss on 1, 2, ... processes of one thread each, over gloo on this machine."""
    points = []
    for world in counts_of_ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = torch.multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, world, port, shape, seconds, results)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a rank of {world} failed; its message is above")
        points.append(results.get())
    return points


def _rank(rank: int, world: int, port: int, shape: Shape, seconds: float, results: Any) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from ood_fast import distributed

    n, c, m = shape
    logits, W, y = leaves(shape)
    # Whole classes for each rank, and one rank as the others: the same function runs everywhere.
    own = slice(rank * c // world, (rank + 1) * c // world)
    logits, W = (t.detach()[..., own, :].clone() if t is W else t.detach()[:, own].clone() for t in (logits, W))
    logits, W = logits.requires_grad_(), W.requires_grad_()
    rounds = 20

    def timed(step: Callable[[], object]) -> float:
        step()
        times = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    measured = timed(lambda: torch.autograd.grad(distributed.elogitnorm(logits, W, y), (logits, W)))
    small_one, large_one = torch.zeros(2), torch.zeros(1 << 20)
    latency = timed(lambda: dist.all_reduce(small_one))
    large = timed(lambda: dist.all_reduce(large_one))
    sent = distributed.communication_bytes(n, m, world, n_predicted=min(n, c)).per_rank
    dist.barrier()
    if rank == 0:
        bandwidth = 2 * (world - 1) / world * 4 * (1 << 20) / max(large - latency, 1e-9)
        alone = model(constants(seconds)["elogitnorm"], "elogitnorm", (n, c // world, m))  # of one thread, here
        travel = 0.0 if world == 1 else COLLECTIVES * latency + sent / bandwidth
        results.put(
            {
                "ranks": world,
                "shape": shape,
                "seconds": {"elogitnorm": measured},
                "model": {"elogitnorm": alone + travel},
                "bytes_sent_per_rank": sent,
                "all_reduce": {"latency": latency, "bytes_per_second": bandwidth},
            }
        )
    dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Which path is right where
# ----------------------------------------------------------------------------------------------------------------------


def with_or_without_logits(seconds: float) -> list[dict[str, Any]]:
    """F.linear + elogitnorm and linear_elogitnorm, time and peak memory: where is the second the better choice?"""
    points = []
    for c in (1000, 10_000, 30_000):
        shape = (256, c, 512)
        z, b = torch.randn(256, 512).requires_grad_(), torch.zeros(c).requires_grad_()
        _, W, y = leaves((2, c, 512))
        y = y.repeat(128)
        candidates = {
            "F.linear + elogitnorm": lambda z=z, W=W, b=b, y=y: torch.autograd.grad(
                ood_fast.elogitnorm(F.linear(z, W, b), None, W, b, y), (z, W, b)
            ),
            "linear_elogitnorm": lambda z=z, W=W, b=b, y=y: torch.autograd.grad(
                ood_fast.linear_elogitnorm(z, W, b, y), (z, W, b)
            ),
        }
        case, cpu = Case("scaling", *shape), torch.device("cpu")
        points.append(
            {
                "shape": shape,
                "seconds": alternate(candidates, seconds),
                "peak_MB": {
                    name: peak_megabytes(functools.partial(baselines.ROWS[name].prepare, case, cpu), cpu)
                    for name in candidates
                },
            }
        )
    return points


# ----------------------------------------------------------------------------------------------------------------------
# Plot, table, command
# ----------------------------------------------------------------------------------------------------------------------

STYLES = {
    "elogitnorm": ("#0072b2", "elogitnorm"),
    "detached": ("#56b4e9", "detach_geometry=True"),
    "cross-entropy": ("#009e73", "F.cross_entropy"),
    "head": ("#444444", "F.linear, the head"),
}
AXES = {"n": 0, "c": 1, "m": 2}
LABELS = {"n": "samples n", "c": "classes c", "m": "features m", "u": "distinct predictions u", "ranks": "ranks"}


def place(axis: str, point: dict[str, Any]) -> float:
    if axis == "u":
        return point["distinct"]
    return point["ranks"] if axis == "ranks" else point["shape"][AXES[axis]]


def fixed(axis: str, points: list[dict[str, Any]]) -> str:
    shape = dict(zip("ncm", points[0]["shape"], strict=True))
    return ", ".join(f"{name} = {value}" for name, value in shape.items() if name != axis)


def draw(found: dict[str, Any]):
    from matplotlib.figure import Figure

    drawn = {axis: found["sweeps"][axis] for axis in LABELS if found["sweeps"].get(axis)}
    figure = Figure(figsize=(4.2 * min(3, len(drawn)), 3.6 * (-(-len(drawn) // 3)) + 0.6), layout="constrained")
    places = figure.subplots(-(-len(drawn) // 3), min(3, len(drawn)), squeeze=False).flat
    for (axis, points), plot in zip(drawn.items(), places, strict=False):
        xs = [place(axis, point) for point in points]
        for name in points[0]["seconds"]:
            color, label = STYLES[name]
            ys = [point["seconds"][name] * 1e3 for point in points]
            line = "none" if name in points[0]["model"] else ":"
            plot.plot(xs, ys, marker="o", markersize=4, linestyle=line, linewidth=0.8, color=color, label=label)
            if name in points[0]["model"]:
                ys = [point["model"][name] * 1e3 for point in points]
                plot.plot(xs, ys, color=color, linewidth=1.2, label=f"{label}, model")
        plot.set(xscale="log" if axis != "ranks" else "linear", yscale="log", xlabel=LABELS[axis], ylabel="ms")
        plot.set_title(fixed(axis, points), fontsize=9)
        plot.grid(which="both", linewidth=0.3)
        if axis == "ranks":
            plot.set_xticks(xs)
    for plot in list(places):
        plot.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    align = "|---" + "|---:" * (len(header) - 1) + "|"
    return [f"| {' | '.join(header)} |", align, *(f"| {' | '.join(line)} |" for line in lines), ""]


def tables(found: dict[str, Any]) -> str:
    """Every point, as Markdown: what docs/performance.md holds between its markers."""
    what = found["environment"]
    text = [
        f"Measured on {what['machine']}, {what['threads']} threads, torch {what['torch']}, commit {what['commit']}, "
        f"{what['date']}; float32, forward + backward, medians in ms, candidates taking turns.",
        "",
    ]
    for axis, points in found["sweeps"].items():
        names = list(points[0]["seconds"])
        text += [f"**{LABELS[axis]}** ({fixed(axis, points)})", ""]
        header = [axis] + [title for n in names for title in ([n, "model"] if n in points[0]["model"] else [n])]
        saved = "detached" in names
        lines = []
        for point in points:
            line = [f"{place(axis, point):,}"]
            for name in names:
                line.append(milliseconds(point["seconds"][name]))
                if name in point["model"]:
                    line.append(milliseconds(point["model"][name]))
            if saved:
                line.append(f"{1 - point['seconds']['detached'] / point['seconds']['elogitnorm']:.0%}")
            lines.append(line)
        text += table(header + ["detaching saves"] * saved, lines)
    if found.get("with_or_without_logits"):
        lines = []
        for p in found["with_or_without_logits"]:
            peaks = [p["peak_MB"][name] for name in p["seconds"]]
            times = [milliseconds(seconds) for seconds in p["seconds"].values()]
            lines.append([str(tuple(p["shape"])), *times, *("" if peak is None else f"{peak:.0f}" for peak in peaks)])
        names = list(found["with_or_without_logits"][0]["seconds"])
        text += ["**With logits and without: ms, and peak MB beyond inputs and gradients**", ""]
        text += table(["(n, c, m)", *names, *(f"{name}, MB" for name in names)], lines)
    return "\n".join(text).rstrip() + "\n"


def embed(text: str, page: Path) -> None:
    """Put the tables between the markers of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=[*LABELS, "paths"], default=[*LABELS, "paths"])
    parser.add_argument("--seconds", type=float, default=0.6, help="for each point (default 0.6)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<machine>)")
    parser.add_argument("--docs", type=Path, help="a page whose tables are to be replaced: docs/performance.md")
    parser.add_argument("--plot-only", action="store_true", help="draw what scaling.json holds")
    arguments = parser.parse_args()
    what = environment()
    folder = arguments.out or Path(__file__).parent / "results" / slug(f"{what['machine']}, {what['threads']} threads")
    file = folder / "scaling.json"
    if arguments.plot_only:
        if not file.exists():
            raise SystemExit(f"{file}: no such file; run this without --plot-only first")
        found = json.loads(file.read_text())
    else:
        constant = constants(arguments.seconds)
        found = {"environment": what, "constants": constant, "sweeps": {}}
        for axis, shapes in sweeps().items():
            if axis in arguments.sweeps:
                found["sweeps"][axis] = sweep(shapes, constant, arguments.seconds)
        if "ranks" in arguments.sweeps and torch.distributed.is_available():
            found["sweeps"]["ranks"] = ranks((64, 20_000, 256), (1, 2), arguments.seconds)
        if "paths" in arguments.sweeps:
            found["with_or_without_logits"] = with_or_without_logits(arguments.seconds)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    draw(found).savefig(folder / "scaling.png", dpi=110, metadata={"Software": None})
    print(tables(found))
    if arguments.docs:
        embed(tables(found), arguments.docs)
    print(f"\nwritten: {file}, {folder / 'scaling.png'}")


if __name__ == "__main__":
    main()

"""From the JSON of pytest-benchmark to tables and plots.

    python -m pytest bench/ --benchmark-only --benchmark-json=results.json
    python -m bench.report results.json              # writes bench/results/<machine>/

Into the folder of the machine: README.md (environment, tables of times, ratios, memory and rates), results.json (every
row that the tables are made of), time-memory.png and roofline.png. Files of one machine are joined; where a row occurs
twice the last file wins. A ratio stands only where both of its rows agreed with float64 in the run that timed them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .latency import LATENCY, ONE_READ, OURS, WITH_MODEL

Row = dict[str, Any]
# Ours: what ratios are taken to.
FIRST = ("elogitnorm", "linear_elogitnorm", "nci_score", "boundary_distance", "row_statistics, MSP")
MEMORY = "out of memory"
KEPT = (
    *("what", "row", "case", "n", "c", "m", "dtype", "distinct_predictions", "error", "correct", "peak_MB"),
    *("bytes", "flops", "GB_per_s", "GFLOP_per_s", "share_of_ceiling", "detector", "library", "images", "device"),
    *("ratio", "ratio_to", "no_peak", "not_compared"),
)
# What the figures of a table mean beyond what is said for all.
NOTES = {
    WITH_MODEL: "Of the model: bytes of images, parameters and logits, each once, for what moves between layers "
    "depends on how they are fused; flops as `torch.utils.flop_counter` counts them.",
}


class Results:
    """The rows of one machine, and what they were measured on."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.left_out: dict[tuple[str, str], str] = {}
        self.ceilings: dict[str, float] = {}
        self.environment: dict[str, Any] = {}
        self.clocks: dict[str, Any] = {}

    def add(self, document: dict[str, Any]) -> None:
        """The JSON of a run, or a results.json that `write` has left. ValueError for one of another machine."""
        before, self.environment = title(self), document.get("environment") or document["machine_info"]["environment"]
        if before not in (None, title(self)):
            raise ValueError(f"measured on {title(self)}, the files before it on {before}: a report is of one machine")
        self.ceilings = document.get("ceilings") or self.ceilings
        self.clocks = document.get("gpu_state_at_end") or self.clocks
        for entry in document.get("left_out", ()):
            if (entry["group"], entry["row"]) not in self.rows:
                self.left_out[entry["group"], entry["row"]] = entry["reason"]
        for entry in document["benchmarks"]:
            row = entry if "seconds" in entry else _row(entry)
            self.rows[row["group"], row["row"]] = row
            self.left_out.pop((row["group"], row["row"]), None)

    def groups(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows.values():
            found.setdefault(row["group"], []).append(row)
        return found

    def document(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "ceilings": self.ceilings,
            "gpu_state_at_end": self.clocks,
            "benchmarks": list(self.rows.values()),
            "left_out": [{"group": g, "row": r, "reason": reason} for (g, r), reason in self.left_out.items()],
        }


def _row(entry: dict[str, Any]) -> Row:
    extra, stats = entry["extra_info"], entry["stats"]
    kept = {name: extra[name] for name in KEPT if extra.get(name) is not None}
    what, _, _ = (entry["group"] or "").partition(",")
    return (
        {"group": entry["group"] or entry["name"], "what": what, "row": entry["name"]}
        | kept
        | {
            "seconds": stats["median"],
            "iqr": stats["iqr"],
            "rounds": stats["rounds"],
        }
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def ratio(row: Row | None, other: Row | None) -> float | None:
    """Time of `row` over time of `other`; None unless both were compared with float64 in their run, and agreed."""
    if row is None or other is None or not (row.get("correct") and other.get("correct")):
        return None
    return row["seconds"] / other["seconds"]


UNSTEADY = 0.2  # interquartile range over median, above which a time is marked


def mark(*rows: Row | None) -> str:
    """ "~" before a figure in which a time is not to be relied on: one round, or rounds that differ widely."""
    return "~" if any(row and (row["rounds"] < 2 or row["iqr"] > UNSTEADY * row["seconds"]) for row in rows) else ""


def in_turns(row: Row) -> str:
    """The ratio to another step that was measured in turns with this one, where there is one."""
    return f" ({row['ratio']:.3g} × {row['ratio_to']}, in turns)" if "ratio" in row else ""


def extra_over_head(rows: dict[str, Row], name: str) -> float | None:
    """(loss − cross-entropy) / head: what the loss adds to a step, in units of the head's own forward and backward."""
    loss, plain, head = (rows.get(key) for key in (name, "F.cross_entropy", "F.linear (the head)"))
    if ratio(loss, head) is None or ratio(plain, head) is None:
        return None
    return (loss["seconds"] - plain["seconds"]) / head["seconds"]


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" if ms >= 1 else f"{ms:.2g}" if ms >= 0.01 else f"{ms:.1e}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _peak(row: Row | None) -> str:
    return "" if row is None else _number(row.get("peak_MB"), ".1f")


def _scaled(value: float | None, unit: float = 1.0) -> str:
    """Three digits of a figure that may be of any size, in units."""
    if value is None:
        return ""
    value /= unit
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.001 or not value else f"{value:.0e}"


def _time(row: Row | None) -> str:
    return "" if row is None else mark(row) + milliseconds(row["seconds"])


def _ratio(row: Row | None, other: Row | None) -> str:
    found = ratio(row, other)
    return "" if found is None else mark(row, other) + _number(found)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    align = "|---" + "|---:" * (len(header) - 1) + "|"
    return [f"| {' | '.join(header)} |", align, *(f"| {' | '.join(line)} |" for line in lines), ""]


def group_table(group: str, rows: list[Row], left_out: dict[str, str]) -> list[str]:
    """Every row of one group: time, ratio to ours, memory, bytes, flops, rates, share of the ceiling, error.

    Columns in which no row has anything, such as the ratio to a cross-entropy that is not there, are left out.
    """
    ours = next((row for row in rows if row["row"] in FIRST), None)
    plain = next((row for row in rows if row["row"] == "F.cross_entropy"), None)
    header = ["row", "ms", "IQR", "÷ ours", "÷ cross-entropy", "peak MB"]
    header += ["MB", "GFLOP", "GB/s", "GFLOP/s", "of ceiling", "error"]
    lines = []
    for row in rows:
        wrong = row.get("correct") is False
        share = row.get("share_of_ceiling")
        lines.append(
            [
                row["row"] + (" **(wrong result: no ratio)**" if wrong else in_turns(row)),
                _time(row),
                milliseconds(row["iqr"]),
                _ratio(row, ours),
                _ratio(row, plain),
                _peak(row),
                _scaled(row.get("bytes"), 1e6),
                _scaled(row.get("flops"), 1e9),
                _scaled(row.get("GB_per_s")),
                _scaled(row.get("GFLOP_per_s")),
                "" if share is None else f"{share:.0%}",
                _number(row.get("error"), ".0e"),
            ]
        )
    used = [place for place in range(len(header)) if any(line[place] for line in lines)]
    header, *lines = ([line[place] for place in used] for line in (header, *lines))
    # What does not fit stands where its time would; what this machine just does not have, below.
    lines += [[name, why, *[""] * (len(header) - 2)] for name, why in left_out.items() if why.startswith(MEMORY)]
    absent = [f"{name}: {why}." for name, why in left_out.items() if not why.startswith(MEMORY)]
    notes = [NOTES[rows[0]["what"]]] if rows[0]["what"] in NOTES else []
    notes += [f"No peak memory: {why}." for why in dict.fromkeys(row["no_peak"] for row in rows if "no_peak" in row)]
    notes += [f"No ratio for {row['row']}: {row['not_compared']}." for row in rows if "not_compared" in row]
    notes += ["Left out. " + " ".join(absent)] if absent else []
    u = next((row["distinct_predictions"] for row in rows if row.get("distinct_predictions")), None)
    text = [f"### {group}" + (f", u = {u}" if u else ""), "", *_table(header, lines)]
    return text + [line for note in notes for line in (note, "")]


def loss_table(results: Results) -> list[str]:
    """One line a case: what the loss costs beside cross-entropy and the head."""
    lines = []
    for group, rows in results.groups().items():
        if rows[0]["what"] != "loss forward + backward":
            continue
        by_name = {row["row"]: row for row in rows}
        ours = by_name.get("elogitnorm")
        if ours is None:
            continue
        literal = by_name.get("literal definition")
        reason = results.left_out.get((group, "literal definition"), "").partition(":")[0]
        lines.append(
            [
                f"{ours['case']} ({ours['n']}, {ours['c']}, {ours['m']}) {ours['dtype']}",
                *(
                    mark(by_name[k]) + milliseconds(by_name[k]["seconds"]) if k in by_name else ""
                    for k in _LOSS_COLUMNS
                ),
                mark(literal) + milliseconds(literal["seconds"]) if literal else reason,
                _ratio(ours, by_name.get("F.cross_entropy")),
                _number(extra_over_head(by_name, "elogitnorm")),
                _number(extra_over_head(by_name, "elogitnorm, detached")),
            ]
        )
    if not lines:
        return []
    header = ["case (n, c, m)", "cross-entropy", "head", "**elogitnorm**", "detached", "Gram form", "compiled"]
    header += ["literal definition", "÷ cross-entropy", "extra ÷ head", "detached extra ÷ head"]
    text = "Milliseconds. Extra: the time beyond cross-entropy's, over that of the head's own forward + backward."
    return ["## The loss, forward + backward", "", text, "", *_table(header, lines)]


_LOSS_COLUMNS = (
    *("F.cross_entropy", "F.linear (the head)", "elogitnorm", "elogitnorm, detached"),
    *("Gram form, autograd", "Gram form, torch.compile"),
)


def latency_table(results: Results) -> list[str]:
    """One line a detector: ms an image, ours and each other library's, how many times ours is faster, and memory."""
    text: list[str] = []
    for group, rows in results.groups().items():
        if rows[0]["what"] != LATENCY:
            continue
        cells = {(row["detector"], row["library"]): row for row in rows if "detector" in row}
        others = sorted({library for _, library in cells} - {OURS})
        lines = []
        for detector in dict.fromkeys(name for name, _ in cells):
            ours = cells.get((detector, OURS))
            line, peaks = [detector, milliseconds(ours and ours["seconds"] / ours["images"])], [_peak(ours)]
            for library in others:
                other = cells.get((detector, library))
                line.append(milliseconds(other and other["seconds"] / other["images"]))
                faster = ours and other and ratio(other, ours)
                line.append(_number(faster or None))
                peaks.append(_peak(other))
            lines.append(line + peaks)
        header = ["detector", OURS, *(name for library in others for name in (library, f"{library} ÷ ours"))]
        header += [f"peak MB, {library}" for library in (OURS, *others)]
        text += [f"## Latency: ms an image from stored features and logits, {group.partition(', ')[2]}", ""]
        text += _table(header, lines)
    return text


def markdown(results: Results, command: str, plots: Sequence[str]) -> str:
    what = results.environment
    text = [f"# {title(results)}", "", f"Written by `{command}`; every number is in `results.json`.", ""]
    text += _table(["", ""], [[name, str(value)] for name, value in what.items()])
    if results.clocks:
        text += ["GPU at the end: " + ", ".join(f"{k} {v}" for k, v in results.clocks.items()), ""]
    if results.ceilings:
        c = results.ceilings
        text += [
            f"Ceilings measured in the same run: copy {c['copy']:,.1f} GB/s (read + written), matrix product "
            f"{c['fp32']:,.0f} GFLOP/s in float32, {c['bf16']:,.0f} in bfloat16. Bytes and flops are those of "
            "`bench/counts.py`: what the operation needs, whoever computes it. The share of the ceiling is the longer "
            "of the two times that its bytes and its flops take at best, over the time measured; what stays in the "
            "caches can beat the copy. MB and GFLOP are those bytes and flops; peak MB is what a step takes at most "
            "beyond its inputs and what it returns, on a CPU to about 0.3 MB. ~ marks what rests on a single round, or "
            f"on rounds whose interquartile range is above {UNSTEADY:.0%} of their median.",
            "",
        ]
    text += loss_table(results) + latency_table(results)
    text += [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    text += ["## Every group", ""]
    for group, rows in results.groups().items():
        left_out = {row: reason for (g, row), reason in results.left_out.items() if g == group}
        text += group_table(group, rows, left_out)
    return "\n".join(text).rstrip() + "\n"


def title(results: Results) -> str | None:
    """The machine: its GPU where it has one, else its processor with the number of threads; None without results."""
    what = results.environment
    if not what:
        return None
    return what["device"] if what["device"] != "cpu" else f"{what['machine']}, {what['threads']} threads"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ----------------------------------------------------------------------------------------------------------------------
# Plots
# ----------------------------------------------------------------------------------------------------------------------


def draw(results: Results, folder: Path) -> list[str]:
    """The plots that the rows allow, by file name."""
    drawn = {"time-memory.png": _time_and_memory(results), "roofline.png": _roofline(results)}
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    return [name for name, figure in drawn.items() if figure is not None]


def _axes(count: int, width: float = 5.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 4.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(which="both", linewidth=0.3)
        axis.set(xscale="log", yscale="log")
    return figure, axes


COLORS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#444444", "#999999", "#f0e442", "#000000")


def _time_and_memory(results: Results):
    """Time and peak memory against c, a curve for each row of the loss tables with and without logits.

    Where cases share a class count (two widths of ImageNet), the one with the most features is drawn.
    """
    curves: dict[str, dict[int, Row]] = {}
    main = "bf16" if results.environment["device"] != "cpu" else "fp32"
    for row in results.rows.values():
        if row["what"] in ("loss forward + backward", "head and loss, forward + backward") and row["dtype"] == main:
            curve = curves.setdefault(row["row"], {})
            if row["c"] not in curve or curve[row["c"]]["m"] < row["m"]:
                curve[row["c"]] = row
    if not curves:
        return None
    figure, (time, memory) = _axes(2, 6.0)
    for number, (name, curve) in enumerate(curves.items()):
        from_features = "linear" in name.lower() and "head" not in name
        style = {
            "color": COLORS[number % len(COLORS)],
            "marker": "o",
            "markersize": 3,
            "linewidth": 1.8 if name in FIRST else 0.9,
            "linestyle": "--" if from_features else "-",
        }
        points = sorted(curve.items())
        time.plot([c for c, _ in points], [row["seconds"] * 1e3 for _, row in points], label=name, **style)
        # Pages are counted: below a tenth of a megabyte there is nothing to tell apart.
        points = [(c, max(row["peak_MB"], 0.1)) for c, row in points if row.get("peak_MB") is not None]
        memory.plot([c for c, _ in points], [peak for _, peak in points], **style)
    time.set(xlabel="classes c", ylabel="ms, forward + backward", title="Time")
    memory.set(xlabel="classes c", ylabel="MB", title="Peak memory beyond inputs and gradients")
    figure.suptitle(f"{title(results)} (dashed: from features, head included; n and m differ by case)", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _roofline(results: Results):
    """GFLOP/s against flops a byte, under what this machine reaches at best, of losses, scores and row statistics."""
    elsewhere = (LATENCY, ONE_READ, WITH_MODEL)
    rows = [row for row in results.rows.values() if row.get("bytes") and row["what"] not in elsewhere]
    if not rows or not results.ceilings:
        return None
    figure, (axis,) = _axes(1, 7.5)
    names = list(dict.fromkeys(row["row"] for row in rows))
    lowest = min(row["flops"] / row["bytes"] for row in rows) / 2
    highest = max(row["flops"] / row["bytes"] for row in rows) * 2
    for dtype, style in (("fp32", "-"), ("bf16", "--")):
        top = results.ceilings[dtype]
        corner = top / results.ceilings["copy"]
        xs = sorted({lowest, min(max(corner, lowest), highest), highest})
        axis.plot(
            xs, [min(top, results.ceilings["copy"] * x) for x in xs], color="black", linestyle=style, linewidth=1,
            label=f"measured ceilings, {dtype}",
        )  # fmt: skip
    for number, name in enumerate(names):
        points = [(row["flops"] / row["bytes"], row["GFLOP_per_s"]) for row in rows if row["row"] == name]
        marker = "os^vD*P"[number // len(COLORS) % 7]
        axis.scatter(*zip(*points, strict=True), s=14, color=COLORS[number % len(COLORS)], marker=marker, label=name)
    axis.set(xlabel="flops a byte", ylabel="GFLOP/s", title=f"Roofline, {title(results)}")
    figure.legend(loc="outside right upper", fontsize=6)
    return figure


def write(results: Results, folder: Path, command: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw(results, folder)
    (folder / "results.json").write_text(json.dumps(results.document(), indent=1) + "\n")
    (folder / "README.md").write_text(markdown(results, command, plots))
    return folder


def load(paths: Sequence[Path]) -> Results:
    results = Results()
    for path in paths:
        try:
            results.add(json.loads(path.read_text()))
        except FileNotFoundError:
            raise SystemExit(f"{path}: no such file; make one with pytest bench/ --benchmark-json={path}") from None
        except (json.JSONDecodeError, KeyError) as error:
            raise SystemExit(f"{path}: not the JSON of a run of bench/ ({error!r})") from None
        except ValueError as error:
            raise SystemExit(f"{path}: {error}") from None
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, help="folder to write into (default: bench/results/<machine>)")
    arguments = parser.parse_args()
    results = load(arguments.results)
    folder = arguments.out or Path(__file__).parent / "results" / slug(title(results))
    command = "python -m bench.report " + " ".join(path.name for path in arguments.results)
    print(markdown(results, command, []))
    print(f"written: {write(results, folder, command)}")


if __name__ == "__main__":
    main()

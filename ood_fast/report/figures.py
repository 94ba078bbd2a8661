"""Every plot of the report: what is drawn, and the caption with its number, its formula and where it is from."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..detectors import find
from ..diagnostics import NUMBERS, Diagnosis, accuracy_by_norm, reliability
from ..diagnostics.collapse import COSINE_BINS
from ..diagnostics.diagnosis import ID
from ..diagnostics.plane import regions
from . import pages
from .charts import COLORS, INK, Chart, Series
from .runs import Evaluated, Record

DRAWN = 800  # points of a set in a scatter plot, evenly over the set
HISTOGRAM_BINS = 40
INSIDE = 0.002  # the share of all values beyond either end of a histogram, counted in its end bins

HAAS = "Haas et al., TMLR 2024"
PAPYAN = "Papyan et al., PNAS 2020"
DING = "Ding et al., CVPR 2026"


@dataclass(frozen=True)
class Figure:
    """A chart and its caption, with the number that belongs to it."""

    chart: Chart
    caption: str

    def as_html(self, file: str) -> str:
        """`file`: the name under which the numbers are saved."""
        chart = self.chart
        return (
            f"<figure><figcaption>{html.escape(chart.title)}{pages.download(file, chart.as_csv())}</figcaption>"
            f"{chart.as_svg()}{chart.legend()}<p class=caption>{html.escape(self.caption)}</p></figure>"
        )


def number(value: float | None, digits: int = 4) -> str:
    """For people: "–" where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}".replace("-", "−")


def _each(values: Mapping[str, float]) -> str:
    return "; ".join(f"{name}: {number(value)}" for name, value in values.items()) + "."


# ---- training


def training(records: Sequence[Record]) -> list[Figure]:
    """From log.csv."""

    def best(record: Record) -> str:
        found = record.info.get("best") or {}
        accuracy = number(100 * found.get("validation_accuracy", math.nan))
        return f"{record.name}: best {accuracy} (epoch {found.get('epoch', '–')})"

    figures = [
        _by_epoch(records, {"loss": ""}, "Training loss", "loss", "Mean over the steps of the epoch", log=True),
        _by_epoch(
            records,
            {"train_accuracy": "training", "validation_accuracy": "validation"},
            "Accuracy",
            "accuracy (%)",
            "Training: of the augmented images as they were trained on. " + "; ".join(map(best, records)),
            scale=100,
        ),
        _by_epoch(records, {"learning_rate": ""}, "Learning rate", "learning rate", "At the last step of the epoch"),
        _by_epoch(records, {"images_per_second": ""}, "Throughput", "images/s", "Training images of all processes"),
    ]
    return [figure for figure in figures if figure is not None]


def by_epoch(records: Sequence[Record]) -> list[Figure]:
    """From diagnostics.csv; the CV of the norm and the AUROC of pScore, which the papers plot, come first."""
    figures = []
    for name in sorted(NUMBERS, key=lambda name: name not in ("norm_cv", "pscore_auroc")):
        title, what = NUMBERS[name]
        last = {record.name: record.by_epoch[name][-1] for record in records if record.by_epoch.get(name)}
        caption = f"{title}: {what}. Last: {_each(last)[:-1]}"
        figures.append(_by_epoch(records, {name: ""}, f"{title} by epoch", title, caption, table="by_epoch"))
    return [figure for figure in figures if figure is not None]


def _by_epoch(
    records: Sequence[Record],
    columns: Mapping[str, str],
    title: str,
    y_label: str,
    caption: str,
    *,
    log: bool = False,
    scale: float = 1.0,
    table: str = "log",
) -> Figure | None:
    """A line for each run and column; None if no run has any number."""
    series = []
    for index, record in enumerate(records):
        held = getattr(record, table)
        for position, (column, what) in enumerate(columns.items()):
            values = [scale * value for value in held.get(column, ())]
            if any(map(math.isfinite, values)):
                color = index + COLORS * (len(columns) - 1 - position)  # all but the last dashed
                series.append(Series(f"{record.name} {what}".strip(), held["epoch"], values, color=color))
    if not series:
        return None
    log = log and all(value > 0 for s in series for value in s.ys if math.isfinite(value))
    return Figure(Chart(title, "epoch", y_label, series, y_log=log), f"{caption}.")


def change(records: Sequence[Record]) -> list[Figure]:
    """One for each run that it was measured for."""
    figures = []
    for record in records:
        if record.change is None:
            continue
        edges, counts = record.change.edges.tolist(), record.change.count.tolist()
        names = [
            f"‖z‖ ≥ {number(low, 3)}" if math.isinf(high) else f"{number(low, 3)} ≤ ‖z‖ < {number(high, 3)}"
            for low, high in pairwise(edges)
        ]
        series = [
            Series(name, record.change_epochs[1:], step.tolist())
            for name, step in zip(names, record.change.steps.T, strict=True)
        ]
        total = {
            f"{name} ({count} images)": value
            for name, count, value in zip(names, counts, record.change.total.tolist(), strict=True)
        }
        positive = bool((record.change.steps > 0).any())
        chart = Chart(
            f"Feature change by norm group: {record.name}", "epoch", "mean ‖z_t − z_t−1‖²", series, y_log=positive
        )
        caption = (
            "Of the ID test images, from checkpoint to checkpoint, in the groups of the norm in the last one; "
            f"Δ_m = Σ_t 1/N_m Σ_i ‖z_i,t − z_i,t−1‖² ({HAAS}, eq. 8): {_each(total)}"
        )
        figures.append(Figure(chart, caption))
    return figures


# ---- the features of the training images: all runs in one plot

Found = Sequence[tuple[int, Record, Evaluated, Diagnosis]]  # with the number of the run's colour


def collapse(found: Found) -> list[Figure]:
    """Spectrum, and how near neural collapse the training features are."""

    def line(of: Callable[[Diagnosis], Tensor], first: int = 1) -> list[Series]:
        series = []
        for color, record, _, diagnosis in found:
            ys = of(diagnosis).tolist()
            series.append(Series(record.name, list(range(first, first + len(ys))), ys, color=color))
        return series

    def numbers(name: str) -> str:
        return _each({record.name: diagnosis.numbers[name] for _, record, _, diagnosis in found})

    def cosines(diagnosis: Diagnosis) -> Tensor:
        counts = diagnosis.collapse.cosine_counts.view(COSINE_BINS // 4, 4).sum(dim=1)
        return counts / counts.sum().clamp(min=1)

    edges = torch.linspace(-1, 1, COSINE_BINS // 4 + 1).tolist()
    steps = [
        Series(record.name, edges, cosines(diagnosis).tolist(), "steps", color) for color, record, _, diagnosis in found
    ]
    highest = 1.05 * max(max(s.ys) for s in steps) or 1.0
    simplex = {-1 / (len(d.collapse.classes) - 1) for *_, d in found if len(d.collapse.classes) > 1}
    return [
        Figure(
            Chart("Spectrum of the features", "i", "σ_i", line(lambda d: d.singular_values), y_log=True),
            f"Singular values σ_i of (Z − μ)/√n of the training features, largest first ({DING}). Effective rank "
            f"exp(−Σ p_i log p_i), p_i = σ_i/Σσ (Roy and Vetterli 2007): {numbers('effective_rank')}",
        ),
        Figure(
            Chart(
                "NC1: within- over between-class variance",
                "direction between the class means",
                "r_k",
                line(lambda d: d.collapse.ratios),
                y_log=True,
            ),
            "r_k = v_kᵀ Σ_W v_k / v_kᵀ Σ_B v_k along each direction v_k between the means, the widest first; NC1 = "
            f"tr(Σ_W Σ_B⁺)/C = Σ r_k / C ({HAAS}, eq. 2; {PAPYAN}), 0 in collapse: {numbers('nc1')}",
        ),
        Figure(
            Chart(
                "EN: norms of the class means",
                "classes, by norm",
                "‖μ_c − μ_G‖ / mean",
                line(lambda d: _over_mean(d.collapse.mean_norms).sort(descending=True).values),
            ),
            f"Equinormality: standard deviation over mean of ‖μ_c − μ_G‖ ({HAAS}, eq. 3), 0 in collapse: "
            f"{numbers('equinormality')}",
        ),
        Figure(
            Chart(
                "EA: angles between the class means",
                "cos(μ_c − μ_G, μ_c' − μ_G)",
                "share of the pairs",
                steps,
                y_range=(0.0, highest),
                guides=[[(x, 0.0), (x, highest)] for x in sorted(simplex)],
            ),
            "Equiangularity: mean of |cos + 1/(C − 1)| over the pairs of classes "
            f"({HAAS}, eq. 4, with the sign of {PAPYAN}), 0 in collapse; dotted: −1/(C − 1). "
            f"{numbers('equiangularity')}",
        ),
        Figure(
            Chart(
                "NC3: weights along the class means",
                "classes, by cosine",
                "cos(w_c, μ_c − μ_G)",
                line(lambda d: d.collapse.weight_cosines.sort(descending=True).values),
            ),
            f"NC3 = ‖W/‖W‖ − M/‖M‖‖², rows of M: μ_c − μ_G ({PAPYAN}), 0 where they are aligned, 2 where they have "
            f"nothing in common: {numbers('nc3')}",
        ),
        Figure(
            Chart(
                "NC4: agreement with the nearest class mean",
                "predicted classes, by share",
                "share that agrees",
                line(_agreement),
            ),
            f"Share of the ID test images whose prediction is argmin_c ‖z − μ_c‖ ({PAPYAN}, 1 minus theirs), by "
            f"predicted class; over all images: {numbers('nc4')}",
        ),
    ]


def _over_mean(values: Tensor) -> Tensor:
    return values / values.mean()


def _agreement(diagnosis: Diagnosis) -> Tensor:
    """For each class that is ever predicted, the least first."""
    test, n_classes = diagnosis.sets[ID], len(diagnosis.plane_weight)
    agree = (test.nearest == test.predicted).double()
    count = torch.bincount(test.predicted, minlength=n_classes)
    return (torch.bincount(test.predicted, agree, n_classes) / count)[count > 0].sort().values


# ---- test images: a plot for each run


def of_sets(color: int, record: Record, evaluated: Evaluated, diagnosis: Diagnosis) -> list[Figure]:
    """D against ‖z‖, histograms of norm, D and pScore, the plane, accuracy by norm, calibration; of one run."""
    titles = {ID: "ID", **{name: _title(evaluated, name) for name in diagnosis.sets if name != ID}}
    numbers, test, name = diagnosis.numbers, diagnosis.sets[ID], record.name
    bins = accuracy_by_norm(test.norm, test.correct) if len(test) else None
    figures = [
        Figure(
            Chart(
                f"D against ‖z‖: {name}",
                "‖z‖",
                "D(z)",
                [
                    Series(titles[key], part.norm[some].tolist(), part.distance[some].tolist(), "points")
                    for key, part in diagnosis.sets.items()
                    for some in (_some(len(part)),)
                ],
            ),
            f"D: mean distance to the decision boundaries of the predicted class ({DING}, fig. 2). Up to {DRAWN} "
            "images of each set are drawn, evenly over it. Pearson's r of all: "
            + _each(
                {
                    "ID": numbers["distance_norm_correlation"],
                    **{titles[key]: numbers[f"distance_norm_correlation_ood/{key}"] for key in titles if key != ID},
                }
            ),
        )
    ]
    for attribute, short, auroc, source in (
        ("norm", "‖z‖", "norm_auroc", f"‖z‖₂, the score of {HAAS}"),
        ("distance", "D", "distance_auroc", f"D, the mean distance to the boundaries of the predicted class ({DING})"),
        ("p_score", "pScore", "pscore_auroc", "pScore = w_p·(z − μ)/‖z − μ‖ (Liu and Qin, CVPR 2025)"),
    ):
        values = {titles[key]: getattr(part, attribute).numpy() for key, part in diagnosis.sets.items()}
        separation = _each({titles[key]: 100 * numbers[f"{auroc}/{key}"] for key in titles if key != ID})
        figures.append(histogram(f"{short}: {name}", short, values, f"{source}. AUROC against ID (%): {separation}"))
    if bins is not None:
        chart = Chart(
            f"Accuracy by norm: {name}",
            "mean ‖z‖ of the bin",
            "accuracy (%)",
            [Series("accuracy", bins.norm.tolist(), (100 * bins.accuracy).tolist(), color=color)],
            y_range=(min(99.0, 100 * bins.accuracy.min().item() - 1), 100.0),
        )
        caption = (
            f"ID test images sorted by ‖z‖, in {len(bins.count)} bins of equal size ({HAAS}, fig. 7: 125). "
            f"Spearman's ρ of the bins: {number(bins.rank_correlation)}; all images: "
            f"{100 * test.correct.double().mean():.2f} %."
        )
        figures.append(Figure(chart, caption))
        figures.append(_reliability(name, diagnosis))
    figures.append(_plane(name, record, diagnosis, titles))
    return figures


def _title(evaluated: Evaluated, name: str) -> str:
    part = evaluated.results["sets"].get(name, {"title": name, "group": ""})
    return f"{part['title']} ({part['group']})"


def _some(n: int, limit: int = DRAWN) -> Tensor:
    return torch.linspace(0, n - 1, min(n, limit)).round().long() if n else torch.zeros(0, dtype=torch.long)


def _reliability(name: str, diagnosis: Diagnosis) -> Figure:
    test, series = diagnosis.sets[ID], []
    for title, confidence in (("softmax(f)", test.confidence), ("softmax(f/D)", test.confidence_by_distance)):
        of = reliability(confidence, test.correct)
        held = of.count > 0
        series.append(Series(title, of.confidence[held].tolist(), of.accuracy[held].tolist()))
    chart = Chart(
        f"Reliability: {name}",
        "confidence",
        "accuracy",
        series,
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        guides=[[(0.0, 0.0), (1.0, 1.0)]],
    )
    ece = {"f": 100 * diagnosis.numbers["ece"], "f/D": 100 * diagnosis.numbers["ece_by_distance"]}
    return Figure(
        chart,
        "Accuracy against mean confidence of the ID test images in 15 equal bins (Guo et al., ICML 2017); dotted: "
        f"calibrated. Expected calibration error (%): {_each(ece)}",
    )


def _plane(name: str, record: Record, diagnosis: Diagnosis, titles: Mapping[str, str]) -> Figure:
    """The decision regions, and test images on them."""
    test = diagnosis.sets[ID]
    drawn = {
        key: part.place[_some(len(part), DRAWN // (1 if key == ID else 4))] for key, part in diagnosis.sets.items()
    }
    places = torch.cat([*drawn.values(), diagnosis.plane_means])
    left, right, low, high = _box(places)
    classes = record.info.get("class_names") or list(map(str, range(len(diagnosis.plane_weight))))
    of_class = test.target[_some(len(test))]
    outside = [key for key in drawn if key != ID and len(drawn[key])]
    series = [Series(titles[key], *drawn[key].T.tolist(), kind="crosses", color=INK, listed=False) for key in outside]
    series += [
        Series(
            f"ID class {classes[c]}" if c >= 0 else "ID",
            *drawn[ID][of_class == c].T.tolist(),
            kind="points",
            color=c,
            listed=len(classes) <= COLORS,
        )
        for c in of_class.unique().tolist()
    ]
    chart = Chart(
        f"Features in the plane: {name}",
        "first axis",
        "second axis",
        series,
        x_range=(left, right),
        y_range=(low, high),
        regions=list(regions(diagnosis.plane_weight, diagnosis.plane_bias, (left, right, low, high)).items()),
    )
    if diagnosis.plane_direct:
        what = "The model's two features, with its decision regions"
    else:
        what = (
            "The plane of the first two principal components of the training features, "
            f"{100 * diagnosis.plane_share:.1f} % of their variance, and the decision regions on it; features lie "
            "beside it, and may be classified otherwise than the place where they are drawn"
        )
    return Figure(chart, f"{what} ({DING}, fig. 1). Points: ID test images by class; crosses: OOD.")


def _box(places: Tensor) -> tuple[float, float, float, float]:
    """(left, right, low, high) around points, with some room."""
    if not len(places):
        return -1.0, 1.0, -1.0, 1.0
    low, high = places.min(dim=0).values, places.max(dim=0).values
    room = 0.05 * (high - low) + 1e-6
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


# ---- scores of the detectors


def histogram(title: str, x_label: str, values: Mapping[str, np.ndarray], caption: str) -> Figure:
    """The share of each set in equal bins over all of them."""
    finite = {name: of[np.isfinite(of)] for name, of in values.items()}
    everything = np.concatenate([np.zeros(0), *finite.values()])
    low, high = np.quantile(everything, [INSIDE, 1 - INSIDE]) if len(everything) else (0.0, 1.0)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    series = [
        Series(name, edges.tolist(), (np.histogram(of.clip(low, high), edges)[0] / max(len(of), 1)).tolist(), "steps")
        for name, of in finite.items()
    ]
    left_out = sum(len(of) - len(finite[name]) for name, of in values.items())
    note = f" {left_out} values that are not finite are left out." if left_out else ""
    highest = 1.05 * max((max(s.ys) for s in series), default=1.0) or 1.0
    return Figure(Chart(title, x_label, "share of the set", series, y_range=(0.0, highest)), caption + note)


def scores(record: Record, evaluated: Evaluated, of_detectors: Mapping[str, Mapping[str, np.ndarray]]) -> list[Figure]:
    """A histogram for each detector of a run."""
    titles = {name: "ID" if name == "id" else _title(evaluated, name) for name in evaluated.results["sets"]}
    aurocs = {
        (row["detector"], row["ood_set"]): row["value"]
        for row in evaluated.run["measurements"]
        if row["metric"] == "auroc"
    }
    figures = []
    for detector, sets in of_detectors.items():
        values = {titles[name]: sets[name] for name in titles if name in sets}
        found = {titles[name]: 100 * aurocs[detector, name] for name in titles if (detector, name) in aurocs}
        label = find(detector).label
        settings = evaluated.run["detectors"].get(detector) or {}
        told = ", ".join(f"{name} = {value}" for name, value in settings.items())
        caption = f"Higher is more in-distribution. AUROC (%): {_each(found)}" + (
            f" Parameters: {told}." if told else ""
        )
        figures.append(histogram(f"{label}: {record.name}", f"score of {label}", values, caption))
    return figures


def files(figures: Iterable[Figure], prefix: str) -> str:
    """HTML of figures, whose numbers are saved as `prefix`-<number>-<title>.csv."""
    parts = []
    for figure in figures:
        safe = "".join(letter if letter.isalnum() else "-" for letter in figure.chart.title)
        parts.append(figure.as_html(f"{prefix}-{'-'.join(filter(None, safe.split('-')))}.csv"))
    return f"<div class=charts>{''.join(parts)}</div>"


def rows(figures: Sequence[Sequence[Figure]], prefix: str) -> str:
    """The same of several runs beside each other; of one run, all in one."""
    if all(len(of_kind) == 1 for of_kind in figures):
        return files([of_kind[0] for of_kind in figures], prefix)
    return "".join(files(of_kind, prefix) for of_kind in figures)

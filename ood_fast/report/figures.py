"""Every plot of the report: what is drawn, and the caption with its number, its formula and where it is from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..detectors.registry import label_of
from ..diagnostics import NUMBERS, Diagnosis, FeatureChange, accuracy_by_norm, reliability
from ..diagnostics.collapse import COSINE_BINS
from ..diagnostics.diagnosis import ID
from ..diagnostics.plane import regions
from ..evaluation.results import ID as RESULTS_ID
from ..evaluation.results import TITLES, Results, Summary
from ..evaluation.verdict import means_of, ranking
from ..values import TPR
from .charts import COLORS, INK, Chart, Series, histogram
from .record import Evaluated, Record
from .tables import each, number

METHODS = (5, 1, 0, 2, 3, 4, 6, 7)  # colours of methods in their order; the first, often the baseline, is grey
DRAWN = 800  # points of a set in a scatter plot, evenly over the set
CURVE = 200  # points of a ROC curve

HAAS = "Haas et al., TMLR 2024"
PAPYAN = "Papyan et al., PNAS 2020"
DING = "Ding et al., CVPR 2026"


# ---- the verdict


def dots(results: Results) -> list[Chart]:
    """AUROC of each method with each detector, the best detector first; a chart for the mean of each group."""
    order = list(dict.fromkeys(ranked.detector for ranked in ranking(results)))
    baseline, methods = results.baseline, list(results.methods)
    charts = []
    for of in means_of(results):
        found = {(s.method, s.detector): s for s in results.summaries() if (s.metric, s.ood_set) == ("auroc", of)}
        series = []
        for index, method in enumerate(methods):
            held = [(row, found[method, name]) for row, name in enumerate(order) if (method, name) in found]
            intervals = [_interval(s, found.get((baseline or "", s.detector))) for _, s in held]
            shift = 0.6 * ((index + 0.5) / len(methods) - 0.5)
            xs, ys = [100 * s.mean for _, s in held], [row + shift for row, _ in held]
            series.append(Series(method, xs, ys, "dots", color=METHODS[index % len(METHODS)], intervals=intervals))
        lowest = min((x for s in series for x in s.xs), default=50.0)
        bars = "95 % interval over test images"
        if baseline is not None:
            bars = f"95 % interval of the paired difference to {baseline}, drawn from the dot of {baseline}: where it "
            bars += "does not reach that dot, the difference shows"
        n_runs = max(map(len, results.methods.values()))
        caption = f"Dots: {f'mean over {n_runs} seeds' if n_runs > 1 else 'one run'}. Bars: {bars}."
        x_range, labels = (max(0.0, lowest - 0.25 * (100 - lowest) - 1), 100.5), [label_of(name) for name in order]
        name = f"AUROC (%), {TITLES.get(of, of)}"
        charts.append(Chart(name, "AUROC (%)", "", series, caption, x_range=x_range, y_names=labels))
    return charts if order else []


def _interval(summary: Summary, baseline: Summary | None) -> tuple[float, float] | None:
    if summary.gain_low is not None and summary.gain_high is not None and baseline is not None:
        return 100 * (baseline.mean + summary.gain_low), 100 * (baseline.mean + summary.gain_high)
    if baseline is not None or summary.low is None or summary.high is None:
        return None
    return 100 * summary.low, 100 * summary.high


# ---- training


def training(records: Sequence[Record]) -> list[Chart]:
    """From log.csv."""

    def best(record: Record) -> str:
        found = record.info.get("best") or {}
        accuracy = number(100 * found.get("validation_accuracy", math.nan))
        return f"{record.name}: best {accuracy} (epoch {found.get('epoch', '–')})"

    accuracies = {"train_accuracy": "training", "validation_accuracy": "validation"}
    told = f"Training: of the augmented images as they were trained on. {'; '.join(map(best, records))}"
    charts = [
        _by_epoch(records, {"loss": ""}, "Training loss", "loss", "Mean over the steps of the epoch", log=True),
        _by_epoch(records, accuracies, "Accuracy", "accuracy (%)", told, scale=100),
        _by_epoch(records, {"learning_rate": ""}, "Learning rate", "learning rate", "At the last step of the epoch"),
        _by_epoch(records, {"images_per_second": ""}, "Throughput", "images/s", "Training images of all processes"),
    ]
    return [chart for chart in charts if chart is not None]


def by_epoch(records: Sequence[Record]) -> list[Chart]:
    """From diagnostics.csv; the CV of the norm and the AUROC of pScore, which the papers plot, come first."""
    charts = []
    for name in sorted(NUMBERS, key=lambda name: name not in ("norm_cv", "pscore_auroc")):
        title, what = NUMBERS[name]
        last = {record.name: record.by_epoch[name][-1] for record in records if record.by_epoch.get(name)}
        caption = f"{title}: {what}. Last: {each(last)[:-1]}"
        charts.append(_by_epoch(records, {name: ""}, f"{title} by epoch", title, caption, table="by_epoch"))
    return [chart for chart in charts if chart is not None]


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
) -> Chart | None:
    """A line for each run and column; None if no run has any number."""
    series = []
    for index, record in enumerate(records):
        held = getattr(record, table)
        for position, (column, what) in enumerate(columns.items()):
            values = [scale * value for value in held.get(column, ())]
            if any(map(math.isfinite, values)):
                color = index + COLORS * (len(columns) - 1 - position)  # all but the last dashed
                series.append(Series(f"{record.name} {what}".strip(), held["epoch"], values, color=color))
    log = log and all(value > 0 for s in series for value in s.ys if math.isfinite(value))
    return Chart(title, "epoch", y_label, series, f"{caption}.", y_log=log) if series else None


def change(records: Sequence[Record]) -> list[Chart]:
    """One for each run that it was measured for."""
    return [_change(record, record.change) for record in records if record.change is not None]


def _change(record: Record, found: FeatureChange) -> Chart:
    names = [
        f"‖z‖ ≥ {number(low, 3)}" if math.isinf(high) else f"{number(low, 3)} ≤ ‖z‖ < {number(high, 3)}"
        for low, high in pairwise(found.edges.tolist())
    ]
    steps = zip(names, found.steps.T.tolist(), strict=True)
    totals = zip(names, found.count.tolist(), found.total.tolist(), strict=True)
    caption = (
        "Of the ID test images, from checkpoint to checkpoint, in the groups of the norm in the last one; "
        f"Δ_m = Σ_t 1/N_m Σ_i ‖z_i,t − z_i,t−1‖² ({HAAS}, eq. 8): "
        + each({f"{name} ({count} images)": total for name, count, total in totals})
    )
    return Chart(
        *(f"Feature change by norm group: {record.name}", "epoch", "mean ‖z_t − z_t−1‖²"),
        [Series(name, record.change_epochs[1:], step) for name, step in steps],
        caption,
        y_log=bool((found.steps > 0).any()),
    )


# ---- the features of the training images: all runs in one plot

Found = Sequence[tuple[int, Record, Evaluated, Diagnosis]]  # with the number of the run's colour


def collapse(found: Found) -> list[Chart]:
    """Spectrum, and how near neural collapse the training features are."""

    def lines(of: Callable[[Diagnosis], Tensor]) -> list[Series]:
        values = [(color, record.name, of(diagnosis).tolist()) for color, record, _, diagnosis in found]
        return [Series(name, list(range(1, len(ys) + 1)), ys, color=color) for color, name, ys in values]

    def numbers(name: str) -> str:
        return each({record.name: diagnosis.numbers[name] for _, record, _, diagnosis in found})

    return [
        Chart(
            *("Spectrum of the features", "i", "σ_i", lines(lambda d: d.singular_values)),
            f"Singular values σ_i of (Z − μ)/√n of the training features, largest first ({DING}). Effective rank "
            f"exp(−Σ p_i log p_i), p_i = σ_i/Σσ (Roy and Vetterli 2007): {numbers('effective_rank')}",
            y_log=True,
        ),
        Chart(
            *("NC1: within- over between-class variance", "direction between the class means", "r_k"),
            lines(lambda d: d.collapse.ratios),
            "r_k = v_kᵀ Σ_W v_k / v_kᵀ Σ_B v_k along each direction v_k between the means, the widest first; NC1 = "
            f"tr(Σ_W Σ_B⁺)/C = Σ r_k / C ({HAAS}, eq. 2; {PAPYAN}), 0 in collapse: {numbers('nc1')}",
            y_log=True,
        ),
        Chart(
            *("EN: norms of the class means", "classes, by norm", "‖μ_c − μ_G‖ / mean"),
            lines(lambda d: (d.collapse.mean_norms / d.collapse.mean_norms.mean()).sort(descending=True).values),
            f"Equinormality: standard deviation over mean of ‖μ_c − μ_G‖ ({HAAS}, eq. 3), 0 in collapse: "
            f"{numbers('equinormality')}",
        ),
        _angles(found, numbers("equiangularity")),
        Chart(
            *("NC3: weights along the class means", "classes, by cosine", "cos(w_c, μ_c − μ_G)"),
            lines(lambda d: d.collapse.weight_cosines.sort(descending=True).values),
            f"NC3 = ‖W/‖W‖ − M/‖M‖‖², rows of M: μ_c − μ_G ({PAPYAN}), 0 where they are aligned, 2 where they have "
            f"nothing in common: {numbers('nc3')}",
        ),
        Chart(
            *("NC4: agreement with the nearest class mean", "predicted classes, by share", "share that agrees"),
            lines(_agreement),
            f"Share of the ID test images whose prediction is argmin_c ‖z − μ_c‖ ({PAPYAN}, 1 minus theirs), by "
            f"predicted class; over all images: {numbers('nc4')}",
        ),
    ]


def _angles(found: Found, told: str) -> Chart:
    edges, series = torch.linspace(-1, 1, COSINE_BINS // 4 + 1).tolist(), []
    for color, record, _, diagnosis in found:
        counts = diagnosis.collapse.cosine_counts.view(COSINE_BINS // 4, 4).sum(dim=1)
        series.append(Series(record.name, edges, (counts / counts.sum().clamp(min=1)).tolist(), "steps", color))
    highest = 1.05 * max(max(s.ys) for s in series) or 1.0
    simplex = {-1 / (len(d.collapse.classes) - 1) for *_, d in found if len(d.collapse.classes) > 1}
    return Chart(
        *("EA: angles between the class means", "cos(μ_c − μ_G, μ_c' − μ_G)", "share of the pairs", series),
        f"Equiangularity: mean of |cos + 1/(C − 1)| over the pairs of classes ({HAAS}, eq. 4, with the sign of "
        f"{PAPYAN}), 0 in collapse; dotted: −1/(C − 1). {told}",
        y_range=(0.0, highest),
        guides=[[(x, 0.0), (x, highest)] for x in sorted(simplex)],
    )


def _agreement(diagnosis: Diagnosis) -> Tensor:
    """For each class that is ever predicted, the least first."""
    test, n_classes = diagnosis.sets[ID], len(diagnosis.plane_weight)
    agree = (test.nearest == test.predicted).double()
    count = torch.bincount(test.predicted, minlength=n_classes)
    return (torch.bincount(test.predicted, agree, n_classes) / count)[count > 0].sort().values


# ---- test images: a plot for each run


def of_sets(color: int, record: Record, evaluated: Evaluated, diagnosis: Diagnosis) -> list[Chart]:
    """D against ‖z‖, histograms of norm, D and pScore, the plane, accuracy by norm, calibration; of one run."""
    titles = {ID: "ID", **{name: _title(evaluated, name) for name in diagnosis.sets if name != ID}}
    numbers, sets, name = diagnosis.numbers, diagnosis.sets, record.name
    ood = [key for key in titles if key != ID]
    drawn = {key: _some(len(part)) for key, part in sets.items()}
    correlations = {titles[key]: numbers[f"distance_norm_correlation_ood/{key}"] for key in ood}
    charts = [
        Chart(
            *(f"D against ‖z‖: {name}", "‖z‖", "D(z)"),
            [
                Series(titles[key], part.norm[drawn[key]].tolist(), part.distance[drawn[key]].tolist(), "points")
                for key, part in sets.items()
            ],
            f"D: mean distance to the decision boundaries of the predicted class ({DING}, fig. 2). Up to {DRAWN} "
            "images of each set are drawn, evenly over it. Pearson's r of all: "
            + each({"ID": numbers["distance_norm_correlation"], **correlations}),
        )
    ]
    for attribute, short, auroc, source in (
        ("norm", "‖z‖", "norm_auroc", f"‖z‖₂, the score of {HAAS}"),
        ("distance", "D", "distance_auroc", f"D, the mean distance to the boundaries of the predicted class ({DING})"),
        ("p_score", "pScore", "pscore_auroc", "pScore = w_p·(z − μ)/‖z − μ‖ (Liu and Qin, CVPR 2025)"),
    ):
        values = {titles[key]: getattr(part, attribute).numpy() for key, part in sets.items()}
        separation = each({titles[key]: 100 * numbers[f"{auroc}/{key}"] for key in ood})
        charts.append(histogram(f"{short}: {name}", short, values, f"{source}. AUROC against ID (%): {separation}"))
    if len(sets[ID]):
        charts += [_accuracy(name, diagnosis, color), _reliability(name, diagnosis)]
    return [*charts, _plane(name, record, diagnosis, titles)]


def _title(evaluated: Evaluated, name: str) -> str:
    part = evaluated.results.sets.get(name)
    return f"{part.title} ({part.group})" if part else f"{name} ()"


def _some(n: int, limit: int = DRAWN) -> Tensor:
    return torch.linspace(0, n - 1, min(n, limit)).round().long() if n else torch.zeros(0, dtype=torch.long)


def _accuracy(name: str, diagnosis: Diagnosis, color: int) -> Chart:
    test = diagnosis.sets[ID]
    bins = accuracy_by_norm(test.norm, test.correct)
    return Chart(
        *(f"Accuracy by norm: {name}", "mean ‖z‖ of the bin", "accuracy (%)"),
        [Series("accuracy", bins.norm.tolist(), (100 * bins.accuracy).tolist(), color=color)],
        f"ID test images sorted by ‖z‖, in {len(bins.count)} bins of equal size ({HAAS}, fig. 7: 125). Spearman's ρ of "
        f"the bins: {number(bins.rank_correlation)}; all images: {100 * test.correct.double().mean():.2f} %.",
        y_range=(min(99.0, 100 * bins.accuracy.min().item() - 1), 100.0),
    )


def _reliability(name: str, diagnosis: Diagnosis) -> Chart:
    test, series = diagnosis.sets[ID], []
    for title, confidence in (("softmax(f)", test.confidence), ("softmax(f/D)", test.confidence_by_distance)):
        of = reliability(confidence, test.correct)
        held = of.count > 0
        series.append(Series(title, of.confidence[held].tolist(), of.accuracy[held].tolist()))
    ece = {"f": 100 * diagnosis.numbers["ece"], "f/D": 100 * diagnosis.numbers["ece_by_distance"]}
    return Chart(
        *(f"Reliability: {name}", "confidence", "accuracy", series),
        f"Accuracy against mean confidence of the ID test images in {metrics.ECE_BINS} equal bins (Guo et al., ICML "
        f"2017); dotted: calibrated. Expected calibration error (%): {each(ece)}",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        guides=[[(0.0, 0.0), (1.0, 1.0)]],
    )


def _plane(name: str, record: Record, diagnosis: Diagnosis, titles: Mapping[str, str]) -> Chart:
    """The decision regions, and test images on them."""
    sets = diagnosis.sets
    drawn = {key: part.place[_some(len(part), DRAWN // (1 if key == ID else 4))] for key, part in sets.items()}
    left, right, low, high = _box(torch.cat([*drawn.values(), diagnosis.plane_means]))
    classes = record.info.get("class_names") or list(map(str, range(len(diagnosis.plane_weight))))
    of_class = sets[ID].target[_some(len(sets[ID]))]
    outside = [(titles[key], drawn[key].T.tolist()) for key in drawn if key != ID and len(drawn[key])]
    series = [Series(title, xs, ys, "crosses", INK, listed=False) for title, (xs, ys) in outside]
    for c in of_class.unique().tolist():
        xs, ys = drawn[ID][of_class == c].T.tolist()
        called = f"ID class {classes[c]}" if c >= 0 else "ID"
        series.append(Series(called, xs, ys, "points", color=c, listed=len(classes) <= COLORS))
    what = (
        "The model's two features, with its decision regions"
        if diagnosis.plane_direct
        else "The plane of the first two principal components of the training features, "
        f"{100 * diagnosis.plane_share:.1f} % of their variance, and the decision regions on it; features lie beside "
        "it, and may be classified otherwise than the place where they are drawn"
    )
    return Chart(
        *(f"Features in the plane: {name}", "first axis", "second axis", series),
        f"{what} ({DING}, fig. 1). Points: ID test images by class; crosses: the other sets.",
        x_range=(left, right),
        y_range=(low, high),
        regions=list(regions(diagnosis.plane_weight, diagnosis.plane_bias, (left, right, low, high)).items()),
    )


def _box(places: Tensor) -> tuple[float, float, float, float]:
    """(left, right, low, high) around points, with some room."""
    if not len(places):
        return -1.0, 1.0, -1.0, 1.0
    low, high = places.min(dim=0).values, places.max(dim=0).values
    room = 0.05 * (high - low) + 1e-6
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


# ---- scores of the detectors


def scores(record: Record, evaluated: Evaluated, of_detectors: Mapping[str, Mapping[str, np.ndarray]]) -> list[Chart]:
    """A histogram for each detector of a run."""
    titles = {name: "ID" if name == "id" else _title(evaluated, name) for name in evaluated.results.sets}
    found = {(of.detector, of.ood_set): of.value for of in evaluated.run.measurements if of.metric == "auroc"}
    charts = []
    for detector, sets in of_detectors.items():
        values = {titles[name]: sets[name] for name in titles if name in sets}
        aurocs = {titles[name]: 100 * found[detector, name] for name in titles if (detector, name) in found}
        label = label_of(detector)
        settings = evaluated.run.settings.get(detector, {}).items()
        told = f" Parameters: {', '.join(f'{name} = {value}' for name, value in settings)}." if settings else ""
        caption = f"Higher is more in-distribution. AUROC (%): {each(aurocs)}{told}"
        chart = histogram(f"{label}: {record.name}", f"score of {label}", values, caption)
        kept = sets["id"][np.isfinite(sets["id"])] if "id" in sets else np.zeros(0)
        for threshold in [float(np.quantile(kept, 1 - TPR))] if len(kept) else ():
            told = f"{chart.caption} Dotted: {number(threshold)}, the threshold that keeps {100 * TPR:g} % of ID."
            chart = replace(chart, caption=told, guides=[[(threshold, 0.0), (threshold, 1.0)]])
        charts.append(chart)
    return charts


def roc(record: Record, evaluated: Evaluated, detector: str, sets: Mapping[str, np.ndarray]) -> Chart:
    """A curve for each OOD set, of the best detector."""
    label, aurocs = label_of(detector), {}
    series: list[Series] = []
    for name in [name for name in evaluated.results.sets if name != RESULTS_ID and name in sets]:
        inside, outside = (of[~np.isnan(of)] for of in (sets[RESULTS_ID], sets[name]))
        if len(inside) and len(outside):
            points = torch.stack(metrics.roc_curve(inside, outside, positive="id"), 1)
            points = points[_some(len(points), CURVE)]
            color = len(series) + 1  # 0 is ID, in the histograms below
            xs, ys = points.T.tolist()
            series.append(Series(_title(evaluated, name), xs, ys, color=color))
            aurocs[_title(evaluated, name)] = 100 * metrics.auroc(inside, outside)
    return Chart(
        *(f"ROC of {label}: {record.name}", "OOD images accepted", "ID images accepted", series),
        f"At every threshold of {label}, the best detector. Area (AUROC, %): {each(aurocs)}",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        guides=[[(0.0, 0.0), (1.0, 1.0)]],
    )


# ---- on the page


def shown(charts: Iterable[Chart], prefix: str) -> str:
    """HTML of charts, whose numbers are saved as `prefix`-<title>.csv."""
    parts = []
    for chart in charts:
        safe = "".join(letter if letter.isalnum() else "-" for letter in chart.title)
        parts.append(chart.as_html(f"{prefix}-{'-'.join(filter(None, safe.split('-')))}.csv"))
    return f"<div class=charts>{''.join(parts)}</div>"


def by_kind(kinds: Sequence[Sequence[Chart]], prefix: str) -> str:
    """The same of several runs beside each other; of one run, all in one."""
    if all(len(of_kind) == 1 for of_kind in kinds):
        return shown([of_kind[0] for of_kind in kinds], prefix)
    return "".join(shown(of_kind, prefix) for of_kind in kinds)

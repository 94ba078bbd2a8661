"""The plots of a comparison. Each can be drawn on light paper, for files, and on dark, for screens."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import detectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .compare import Comparison


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    grid: str
    losses: tuple[str, ...]  # one colour a loss, in order
    sets: tuple[str, ...]  # ID, then the OOD sets


# Okabe and Ito's palette, which stays apart for colour-blind eyes; lighter on dark paper.
LIGHT = Theme(
    "#ffffff",
    "#222222",
    "#dddddd",
    ("#7a7a7a", "#e08e00", "#0072b2", "#009e73"),
    ("#0072b2", "#e69f00", "#d55e00", "#9467bd"),
)
DARK = Theme(
    "#16191d",
    "#d6d9dd",
    "#3a3f46",
    ("#a8a8a8", "#f5b335", "#56b4e9", "#3ccb9f"),
    ("#56b4e9", "#f0c04f", "#ff7f50", "#c5a3ff"),
)


def draw(comparison: Comparison, theme: Theme) -> dict[str, Figure]:
    """The figures of a comparison by file name."""
    return {
        "histograms.png": _histograms(comparison, theme),
        "roc.png": _roc(comparison, theme),
        "spectrum.png": _spectrum(comparison, theme),
    }


SPECTRUM_FLOOR = 1e-6
TITLES = {
    "histograms.png": "Scores",
    "roc.png": "ROC curves",
    "spectrum.png": "Singular values of the features",
}
WIDE = ("histograms.png", "roc.png")  # not shrunk below what can be read; they scroll on a phone


def captions(comparison: Comparison) -> dict[str, str]:
    """What each figure shows, by file name."""
    seeds = comparison.settings.seeds
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return {
        "histograms.png": f"Share of the images by score, seed {seeds[0]}; right = more in-distribution. The height "
        "grows with the square root of the share, so that small shares show; the outermost 1 % of the scores on each "
        "side are in the first and last bin.",
        "roc.png": "OOD is the positive class: share of OOD images caught (upwards) against share of ID images "
        f"rejected, {over}.",
        "spectrum.png": f"σ of the centred training features, relative to the largest, {over}; values below "
        f"{SPECTRUM_FLOOR:g} are drawn there. A spectrum that falls early: features on few directions.",
    }


def _histograms(comparison: Comparison, theme: Theme) -> Figure:
    names, losses = comparison.settings.detectors, comparison.settings.losses
    figure, axes = _grid(len(losses), len(names), theme, width=2.1, height=1.7)
    for row, loss in enumerate(losses):
        for column, name in enumerate(names):
            axis = axes[row, column]
            scores = comparison.scores[loss][name]
            low, high = np.quantile(np.concatenate(list(scores.values())), (0.01, 0.99))
            if high <= low:
                low, high = low - 0.5, high + 0.5
            edges = np.linspace(low, high, 31)
            for (set_name, values), color in zip(scores.items(), theme.sets, strict=False):
                title = comparison.ood_titles.get(set_name, "ID test images")
                share = np.histogram(np.clip(values, low, high), edges)[0] / len(values)
                axis.stairs(share, edges, color=color, alpha=0.25, fill=True)
                axis.stairs(share, edges, color=color, linewidth=1.2, label=title)
            axis.set_yscale("function", functions=(np.sqrt, np.square))
            axis.set_yticks([])
            axis.locator_params(axis="x", nbins=3)
            if row == 0:
                axis.set_title(detectors.find(name).label, fontsize=10, color=theme.ink)
            if column == 0:
                axis.set_ylabel(loss, fontsize=10, color=theme.ink)
    _legend(figure, axes[0, 0], theme)
    return figure


def _roc(comparison: Comparison, theme: Theme) -> Figure:
    names, n_sets = comparison.settings.detectors, len(comparison.ood_titles)
    figure, axes = _grid(n_sets, len(names), theme, width=2.1, height=2.1)
    for row, (ood_set, heading) in enumerate(comparison.ood_titles.items()):
        for column, name in enumerate(names):
            axis = axes[row, column]
            axis.plot([0, 1], [0, 1], color=theme.grid, linewidth=1, linestyle=":")
            for loss, color in zip(comparison.settings.losses, theme.losses, strict=False):
                curve = np.mean(comparison.roc_curves[loss, name, ood_set], axis=0)
                axis.plot(
                    np.linspace(0, 1, len(curve)), curve, color=color, linewidth=1.5, label=loss, drawstyle="steps-post"
                )
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axis.set_aspect("equal")
            axis.tick_params(labelbottom=row == n_sets - 1, labelleft=column == 0)
            if row == 0:
                axis.set_title(detectors.find(name).label, fontsize=10, color=theme.ink)
            if column == 0:
                axis.set_ylabel(heading.replace(": ", "\n"), fontsize=9, color=theme.ink)
    figure.supxlabel("share of ID images rejected", fontsize=9, color=theme.ink)
    _legend(figure, axes[0, 0], theme)
    return figure


def _spectrum(comparison: Comparison, theme: Theme) -> Figure:
    figure, axes = _grid(1, 1, theme, width=6.4, height=3.6)
    axis = axes[0, 0]
    for loss, color in zip(comparison.settings.losses, theme.losses, strict=False):
        relative = [values / max(values[0], np.finfo(float).tiny) for values in comparison.singular_values[loss]]
        shown = np.clip(np.mean(relative, axis=0), SPECTRUM_FLOOR, None)
        axis.semilogy(np.arange(1, len(shown) + 1), shown, color=color, linewidth=1.8, label=loss)
    axis.set_xlabel("index", color=theme.ink)
    axis.set_ylabel("σ / largest σ", color=theme.ink)
    axis.grid(color=theme.grid, linewidth=0.5)
    _legend(figure, axis, theme)
    return figure


def _grid(rows: int, columns: int, theme: Theme, width: float, height: float) -> tuple[Figure, np.ndarray]:
    # Figure, not pyplot: no global state, no window system, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(width * columns, 4.0), height * rows + 0.6), layout="constrained", facecolor=theme.paper
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_facecolor(theme.paper)
        axis.tick_params(colors=theme.ink, labelsize=7, length=2)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.grid)
    return figure, axes


def _legend(figure: Figure, axis, theme: Theme) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, labelcolor=theme.ink, fontsize=9
    )


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()

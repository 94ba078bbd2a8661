"""Charts as SVG text, without a script: light or dark as the page that they stand in, light as files of their own."""

from __future__ import annotations

import html
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .. import spreadsheet
from . import pages

COLORS = 8  # --c0 to --c7 of style.css; further series repeat them, dashed
INK = -1  # the colour of text


@dataclass(frozen=True)
class Frame:
    """The size of a chart and the room around its axes, in the units of the text, which is 11 high."""

    width: int = 360
    height: int = 250
    left: int = 52
    right: int = 10
    top: int = 8
    bottom: int = 36
    ticks: tuple[int, int] = (6, 5)  # about as many along x and y


PAGE = Frame()
LETTER, ROW = 7.2, 6  # about how wide bold text is; how far the dots of a row are apart
TITLE = 24  # room for one above a drawing that is a file


@dataclass(frozen=True)
class Series:
    """One colour of a chart.

    Attributes:
        xs, ys: numbers; where either is not finite, nothing is drawn. Of "steps", xs are the n + 1 edges.
        kind: "line", "points", "crosses", "steps", or "dots", with their intervals (low, high) along x or None.
        color: number of the colour, or `INK`; as the position among the series if None.
        listed: whether the legend names it.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "line"
    color: int | None = None
    listed: bool = True
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        series: drawn in this order.
        caption: what is drawn, with the number that belongs to it.
        x_log, y_log: logarithmic axis; numbers that are not positive are left out.
        x_range, y_range: of the axes; None: what the series need.
        y_names: names along y in place of numbers, at 0, 1, ... downwards.
        guides: dotted lines, each a list of (x, y); they do not widen the axes.
        regions: areas in the colour of a number, each with its corners.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    x_log: bool = False
    y_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    y_names: Sequence[str] = ()
    guides: Sequence[Sequence[tuple[float, float]]] = ()
    regions: Sequence[tuple[int, Sequence[tuple[float, float]]]] = field(default=(), repr=False)

    def colors(self) -> list[tuple[int, Series]]:
        """The number of the colour of each series."""
        return [(index if s.color is None else s.color, s) for index, s in enumerate(self.series)]

    def as_csv(self) -> str:
        """The numbers that are drawn: series, x, y; of steps, from, to, y."""
        text, steps = io.StringIO(), any(series.kind == "steps" for series in self.series)
        rows = [["series", *(("from", "to") if steps else (self.x_label,)), self.y_label]]
        if self.y_names:
            rows = [["series", "row", self.x_label, "low", "high"]]
        for s in self.series:
            if self.y_names:
                for x, y, interval in zip(s.xs, s.ys, s.intervals, strict=True):
                    rows.append([s.name, self.y_names[round(y)], *(f"{value:.7g}" for value in (x, *(interval or ())))])
                continue
            columns = (s.xs[:-1], s.xs[1:], s.ys) if steps else (s.xs, s.ys)
            rows += [[s.name, *(f"{value:.7g}" for value in row)] for row in zip(*columns, strict=True)]
        spreadsheet.write_rows(text, rows)
        return text.getvalue()

    def as_svg(self) -> str:
        """The drawing, to stand in a page."""
        frame = self.frame
        return f'<svg viewBox="0 0 {frame.width} {frame.height}" {_named(self.title)}>{self.drawn(frame)}</svg>'

    @property
    def frame(self) -> Frame:
        """`PAGE`, or with room for the names along y and a row for each."""
        if not self.y_names:
            return PAGE
        height = PAGE.top + PAGE.bottom + len(self.y_names) * (14 + ROW * len(self.series))
        return replace(PAGE, width=480, height=height, left=round(14 + LETTER * max(map(len, self.y_names))))

    def drawn(self, frame: Frame) -> str:
        """What is inside of the drawing."""
        right, low = frame.width - frame.right, frame.height - frame.bottom
        x_axis = Axis.of((x for s in self.series for x in s.xs), self.x_log, self.x_range, frame.ticks[0])
        y_range = (-0.5, len(self.y_names) - 0.5) if self.y_names else self.y_range
        y_axis = Axis.of((y for s in self.series for y in s.ys), self.y_log, y_range, frame.ticks[1])
        x_axis, y_axis = x_axis.between(frame.left, right), y_axis.between(low, frame.top)
        if self.y_names:
            y_axis = y_axis.between(frame.top, low)  # downwards
        parts = []
        for number, corners in self.regions:
            points = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in corners)
            parts.append(f'<polygon class="region {_color(number)}" points="{points}"/>')
        for tick in x_axis.ticks:
            at = x_axis.at(tick)
            parts.append(f'<path class="grid" d="M{at:.1f} {frame.top}V{low}"/>')
            parts.append(_text(_short(tick), at, low + 13))
        for row, name in enumerate(self.y_names):
            parts.append(f'<path class="grid" d="M{frame.left} {y_axis.at(row + 0.5):.1f}H{right}"/>')
            parts.append(_text(name, frame.left - 6, y_axis.at(row) + 3.5, "end", "head"))
        for tick in () if self.y_names else y_axis.ticks:
            at = y_axis.at(tick)
            parts.append(f'<path class="grid" d="M{frame.left} {at:.1f}H{right}"/>')
            parts.append(_text(_short(tick), frame.left - 4, at + 3.5, "end"))
        parts.append(_text(self.x_label, (frame.left + right) / 2, frame.height - 7))
        parts.append(_text(self.y_label, 9, (frame.top + low) / 2, upwards=True))
        for guide in self.guides:
            points = "L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in guide)
            parts.append(f'<path class="guide" d="M{points}"/>')
        parts += [_drawn(series, number, x_axis, y_axis) for number, series in self.colors()]
        return "".join(parts)

    def legend(self) -> str:
        """The names of the series beside their colours, as HTML; nothing if there is only one."""
        named = [(number, s.name) for number, s in self.colors() if s.listed]
        if len(named) < 2:
            return ""
        spans = (f'<span class="{_color(n)}{_dashed(n)}"><b>{html.escape(name)}</b></span>' for n, name in named)
        return f"<div class=legend>{''.join(spans)}</div>"

    def as_html(self, file: str) -> str:
        """A figure of a page. `file`: the name under which the numbers are saved."""
        return (
            f"<figure><figcaption>{html.escape(self.title)}{pages.download(file, self.as_csv())}</figcaption>"
            f"{self.as_svg()}{self.legend()}<p class=caption>{html.escape(self.caption)}</p></figure>"
        )


def as_file(charts: Sequence[Chart]) -> str:
    """A drawing that is a file of its own: charts beside each other, the legend and the caption of the last below."""
    frames = [chart.frame for chart in charts]
    width, height = sum(frame.width for frame in frames), max((frame.height for frame in frames), default=0) + TITLE
    parts, x = [], 0
    for chart, frame in zip(charts, frames, strict=True):
        title = _text(chart.title, frame.left, TITLE - 8, "start", "head")
        parts.append(f'<g transform="translate({x} 0)">{title}</g>')
        parts.append(f'<g transform="translate({x} {TITLE})">{chart.drawn(frame)}</g>')
        x += frame.width
    x, colors = PAGE.right, charts[-1].colors() if charts else []
    for number, series in colors:
        parts.append(f'<circle class="{_color(number)}" cx="{x}" cy="{height + 8}" r="4"/>')
        parts.append(_text(series.name, x + 9, height + 12, "start"))
        x += round(24 + LETTER * len(series.name))
    lines = textwrap.wrap(charts[-1].caption, int(width / LETTER * 1.2)) if charts else []
    for row, line in enumerate(lines):
        parts.append(_text(line, PAGE.right, height + 32 + 14 * row, "start"))
    style = pages.resource("style.css")
    light, drawing = style[style.index(":root") : style.index("@media")], style[style.index("/* ---- charts */") :]
    height += 30 + 14 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'style="max-width: none; background: #fff"><style>{light}{drawing}</style>{"".join(parts)}</svg>\n'
    )


def histogram(
    title: str, x_label: str, values: Mapping[str, np.ndarray], caption: str, *, bins: int = 40, beyond: float = 0.002
) -> Chart:
    """The share of each set in equal bins over all of them. `beyond`: the share of all values past either end, which
    its bin counts."""
    finite = {name: of[np.isfinite(of)] for name, of in values.items()}
    everything = np.concatenate([np.zeros(0), *finite.values()])
    low, high = np.quantile(everything, [beyond, 1 - beyond]) if len(everything) else (0.0, 1.0)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    series = [
        Series(name, edges.tolist(), (np.histogram(of.clip(low, high), edges)[0] / max(len(of), 1)).tolist(), "steps")
        for name, of in finite.items()
    ]
    left_out = sum(len(of) - len(finite[name]) for name, of in values.items())
    note = f" {left_out} values that are not finite are left out." if left_out else ""
    highest = 1.05 * max((max(s.ys) for s in series), default=1.0) or 1.0
    return Chart(title, x_label, "share of the set", series, caption + note, y_range=(0.0, highest))


def _named(title: str) -> str:
    return f'role="img" aria-label="{html.escape(title)}"'


def _text(text: str, x: float, y: float, anchor: str = "middle", kind: str = "", *, upwards: bool = False) -> str:
    of = f' class="{kind}"' if kind else ""
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if upwards else f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text{of} {place} text-anchor="{anchor}">{html.escape(text)}</text>' if text else ""


def _drawn(series: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
    color = _color(number)
    if series.kind == "steps":
        floor = y_axis.at(y_axis.low)
        path, last = f"M{x_axis.at(series.xs[0]):.1f} {floor:.1f}", x_axis.at(series.xs[-1])
        for left, right, y in zip(series.xs[:-1], series.xs[1:], series.ys, strict=True):
            at = y_axis.at(y) if y_axis.takes(y) else floor
            path += f"L{x_axis.at(left):.1f} {at:.1f}H{x_axis.at(right):.1f}"
        path += f"L{last:.1f} {floor:.1f}"
        return f'<path class="area {color}" d="{path}"/><path class="line {color}" d="{path}"/>'
    places: list[list[str]] = [[]]  # a piece ends where a number is missing
    for x, y in zip(series.xs, series.ys, strict=True):
        if x_axis.takes(x) and y_axis.takes(y):
            places[-1].append(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        elif places[-1]:
            places.append([])
    if series.kind == "dots":
        parts = []
        for x, y, interval in zip(series.xs, series.ys, series.intervals, strict=True):
            at, ends = y_axis.at(y), [x_axis.at(end) for end in interval or (x, x)]
            parts.append(f'<path class="line {color}" d="M{ends[0]:.1f} {at:.1f}H{ends[1]:.1f}"/>')
            parts.append(f'<circle class="{color}" cx="{x_axis.at(x):.1f}" cy="{at:.1f}" r="3.2"/>')
        return "".join(parts)
    if series.kind in ("points", "crosses"):
        mark = "h0" if series.kind == "points" else "m-2 -2l4 4m0 -4l-4 4"
        path = "".join(f"M{place}{mark}" for piece in places for place in piece)
        return f'<path class="{series.kind} {color}" d="{path}"/>'
    path = "".join("M" + "L".join(piece) for piece in places if piece)
    alone = "".join(f"M{piece[0]}h0" for piece in places if len(piece) == 1)
    dots = f'<path class="points {color}" d="{alone}"/>' if alone else ""
    return f'<path class="line {color}{_dashed(number)}" d="{path}"/>{dots}'


def _color(number: int) -> str:
    """The class of the style."""
    return "ink" if number == INK else f"k{number % COLORS}"


def _dashed(number: int) -> str:
    return " dashed" if number >= COLORS else ""


@dataclass(frozen=True)
class Axis:
    """From numbers to places: low at `start`, high at `end`."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def of(cls, values: Iterable[float], log: bool, given: tuple[float, float] | None, n_ticks: int) -> Axis:
        """The axis that `values` need, or the one that is `given`; its ticks are round."""
        kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = given or ((min(kept), max(kept)) if kept else (1.0, 10.0) if log else (0.0, 1.0))
        if log:
            ticks = log_ticks(low, high)
            low, high = min(low, ticks[0]), max(high, ticks[-1])
            if low == high:
                low, high = low / 2, high * 2
        else:
            if low == high:
                low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
            ticks = linear_ticks(low, high, n_ticks)
            if given is None:
                room = 0.03 * (high - low)
                low, high = low - room, high + room
        return cls(low, high, log, tuple(tick for tick in ticks if low <= tick <= high))

    def between(self, start: float, end: float) -> Axis:
        """The same axis in another place."""
        return Axis(self.low, self.high, self.log, self.ticks, start, end)

    def takes(self, value: float) -> bool:
        """Whether it has a place."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        """The place of a number that it takes; of one beyond an end, that end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def linear_ticks(low: float, high: float, n: int) -> list[float]:
    """About n multiples of 1, 2 or 5 times a power of ten, from low to high."""
    raw = (high - low) / n
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around low and high, five at most; 1, 2 and 5 times them where those are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 1:
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) >= 2:
            return inside
        last = max(last, first + 1)
    step = -(-(last - first) // 5)
    return [10.0**power for power in range(first, last + step, step)]


def _short(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")

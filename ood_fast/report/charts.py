"""Charts as SVG text in a page: they take their colours from the page's style, light or dark, and need no script."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 360, 250  # in the units of the text, which is 11 high
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 36
COLORS = 8  # --c0 to --c7 of the style; further series repeat them, dashed
INK = -1  # the colour of text

STYLE = """
:root { --c0: #0072b2; --c1: #e08e00; --c2: #009e73; --c3: #d55e00; --c4: #9467bd; --c5: #7a7a7a; --c6: #c2185b;
  --c7: #6b7a00; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #56b4e9; --c1: #f5b335; --c2: #3ccb9f; --c3: #ff7f50; --c4: #c5a3ff; --c5: #a8a8a8; --c6: #ff80ab;
    --c7: #c0ca33; }
}
.k0 { color: var(--c0); } .k1 { color: var(--c1); } .k2 { color: var(--c2); } .k3 { color: var(--c3); }
.k4 { color: var(--c4); } .k5 { color: var(--c5); } .k6 { color: var(--c6); } .k7 { color: var(--c7); }
.ink { color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; }
figcaption { font-size: .9rem; font-weight: 600; overflow-wrap: anywhere; }
figcaption a { font-weight: 400; font-size: .8rem; color: var(--soft); margin-left: .4rem; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.legend span::before { content: ""; display: inline-block; width: .9em; height: .35em; margin: 0 .35em .15em 0;
  background: currentColor; }
.legend .dashed::before { background: repeating-linear-gradient(90deg, currentColor 0 .3em, transparent 0 .45em); }
.legend b { font-weight: 400; color: var(--soft); }
svg { width: 100%; height: auto; max-width: 34rem; font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: .7; fill: none; }
svg .line { stroke: currentColor; fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 3; } svg .guide { stroke: var(--soft); stroke-dasharray: 2 3; fill: none; }
svg .area { fill: currentColor; fill-opacity: .14; } svg .points { stroke: currentColor; stroke-linecap: round;
  stroke-opacity: .55; stroke-width: 3; fill: none; }
svg .crosses { stroke: currentColor; stroke-width: .8; stroke-opacity: .35; fill: none; }
svg .region { fill: currentColor; fill-opacity: .16; stroke: var(--paper); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Series:
    """One colour of a chart.

    Attributes:
        xs, ys: numbers; where either is not finite, nothing is drawn. Of "steps", xs are the n + 1 edges.
        kind: "line", "points", "crosses", or "steps".
        color: number of the colour, or `INK`; as the position among the series if None.
        listed: whether the legend names it.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "line"
    color: int | None = None
    listed: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        series: drawn in this order.
        x_log, y_log: logarithmic axis; numbers that are not positive are left out.
        x_range, y_range: of the axes; None: what the series need.
        guides: dotted lines, each a list of (x, y); they do not widen the axes.
        regions: areas in the colour of a number, each with its corners.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    guides: Sequence[Sequence[tuple[float, float]]] = ()
    regions: Sequence[tuple[int, Sequence[tuple[float, float]]]] = field(default=(), repr=False)

    def as_csv(self) -> str:
        """The numbers that are drawn: series, x, y; of steps, from, to, y."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        steps = any(series.kind == "steps" for series in self.series)
        writer.writerow(["series", *(("from", "to") if steps else (self.x_label,)), self.y_label])
        for series in self.series:
            columns = (series.xs[:-1], series.xs[1:], series.ys) if steps else (series.xs, series.ys)
            writer.writerows([series.name, *(f"{value:.7g}" for value in row)] for row in zip(*columns, strict=True))
        return text.getvalue()

    def as_svg(self) -> str:
        x_axis = Axis.of((x for s in self.series for x in s.xs), self.x_log, self.x_range, LEFT, WIDTH - RIGHT, 6)
        y_axis = Axis.of((y for s in self.series for y in s.ys), self.y_log, self.y_range, HEIGHT - BOTTOM, TOP, 5)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">',
            *(
                f'<polygon class="region {_color(number)}" points="'
                + " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in corners)
                + '"/>'
                for number, corners in self.regions
            ),
        ]
        for tick in x_axis.ticks:
            at = x_axis.at(tick)
            parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{_short(tick)}</text>')
        for tick in y_axis.ticks:
            at = y_axis.at(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 4}" y="{at + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{html.escape(self.x_label)}</text>')
        y_middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text transform="translate(9 {y_middle}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(self.y_label)}</text>"
        )
        for guide in self.guides:
            points = "L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in guide)
            parts.append(f'<path class="guide" d="M{points}"/>')
        for index, series in enumerate(self.series):
            number = index if series.color is None else series.color
            parts.append(_drawn(series, number, x_axis, y_axis))
        return "".join([*parts, "</svg>"])

    def legend(self) -> str:
        """The names of the series beside their colours, as HTML; nothing if there is only one."""
        named = [(index if s.color is None else s.color, s.name) for index, s in enumerate(self.series) if s.listed]
        if len(named) < 2:
            return ""
        spans = (f'<span class="{_color(n)}{_dashed(n)}"><b>{html.escape(name)}</b></span>' for n, name in named)
        return f"<div class=legend>{''.join(spans)}</div>"


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
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(
        cls,
        values: Iterable[float],
        log: bool,
        given: tuple[float, float] | None,
        start: float,
        end: float,
        n_ticks: int,
    ) -> Axis:
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
        return cls(low, high, log, start, end, tuple(tick for tick in ticks if low <= tick <= high))

    def takes(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
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

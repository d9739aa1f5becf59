"""The report's curves as inline SVG that takes its colours from the page, so one file serves light and dark.

Figures are drawn in marker colours, which are replaced by CSS variables afterwards; text stays text. Nothing
here keeps state in matplotlib: no pyplot, no rcParams left changed.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfplay_jax.report_data import Round, Run, in_order, number

# marker colour → what the page puts there: the ink of text and axes, then the series
_INK = "#0a0b0c"
_SERIES = tuple(f"#0b0c{i:02x}" for i in range(8))
_CSS = {_INK: "var(--muted)", **{color: f"var(--s{i})" for i, color in enumerate(_SERIES)}}
_LINE_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
_MOST_POINTS = 400  # per line: longer runs are averaged, the page stays small
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}

Figure = str  # an <svg> element, or "" where there is nothing to draw


def checkpoints(series: Sequence[tuple[str, Run, str]], label: str, *, share: bool = False) -> Figure:
    """An evaluated number per checkpoint ± its standard error; `series` holds (name, run, evaluation key)."""
    lines = []
    scale = 100.0 if share else 1.0
    for name, run, key in series:
        points = []
        for round_ in run.evaluated:
            value, error = number(round_.summary, "eval", key), number(round_.summary, "eval", f"{key}_se")
            if value is not None and math.isfinite(value):
                known = error is not None and math.isfinite(error)
                points.append((round_.theta, scale * value, scale * error if known and error else 0.0))
        if points:  # matplotlib keeps names that begin with an underscore out of the legend
            lines.append((name.lstrip("_") or "run", np.asarray(points).T))
    if not lines:
        return ""

    def draw(ax: Any) -> None:
        last = max(int(values[0].max()) for _, values in lines)
        apart = min(0.03 * max(1, last), 0.5 / len(lines))  # error bars side by side, not on top of each other
        for i, (name, (theta, value, error)) in enumerate(lines):
            x = theta + apart * (i - (len(lines) - 1) / 2)
            style: dict[str, Any] = {
                "color": _SERIES[i % 8],
                "linestyle": _LINE_STYLES[i // 8 % 4],
                "capsize": 3,
            }
            ax.errorbar(x, value, error, label=name, marker="os^Dv"[i % 5], markersize=4.5, **style)
        ax.set_xticks(_ticks(last), [f"θ{theta}" for theta in _ticks(last)])
        ax.set_xlim(-0.06 * max(1, last) - 0.1, last + 0.06 * max(1, last) + 0.1)
        ax.set_ylabel(label)
        _legend(ax)

    return _svg(label, draw)


def steps(rounds: Sequence[Round], keys: Sequence[tuple[str, str]], label: str) -> Figure:
    """Training metrics over the steps of rounds in a row; `keys` holds (metric, name in the legend)."""
    drawn: list[tuple[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]] = []
    spans = _spans(rounds)
    for key, name in keys:
        pieces = [piece for round_, offset, *_ in spans if len((piece := _curve(round_, key, offset))[0])]
        if pieces:
            drawn.append((name, pieces))
    if not drawn:
        return ""
    used = [span for span in spans if any(len(_curve(span[0], key, 0)[0]) for key, _ in keys)]

    def draw(ax: Any) -> None:
        for i, (name, pieces) in enumerate(drawn):
            for j, (x, y) in enumerate(pieces):
                x, y = _thinned(x, y, max(20, _MOST_POINTS // len(pieces)))
                ax.plot(x, y, color=_SERIES[i % 8], alpha=0.28, linewidth=0.9)
                style = {"linestyle": _LINE_STYLES[i % 4], "marker": "o" if len(x) == 1 else None}
                ax.plot(x, _smooth(y), color=_SERIES[i % 8], label=None if j else name, markersize=4, **style)
        every = math.ceil(len(used) / 12)
        for j, (round_, _, begin, _) in enumerate(used):
            if j:
                ax.axvline(begin + 0.5, color=_INK, alpha=0.45, linewidth=0.7, linestyle=(0, (2, 3)))
            if j % every == 0:
                name = round_.name if len(used) <= 6 else round_.name.removeprefix("round ")
                ax.annotate(
                    name,
                    (begin + 0.5, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 2),
                    textcoords="offset points",
                    fontsize=8.5,
                )
        ax.set_xlim(used[0][2] + (0.5 if used[0][3] > 1 else 0.0), used[-1][3] + 0.5)
        ax.set_xlabel("training step" if len(used) <= 6 else "training step (round above)")
        ax.set_ylabel(label)
        _legend(ax)

    return _svg(label, draw)


def seconds(bars: Sequence[tuple[str, dict[str, float]]], label: str) -> Figure:
    """Time per phase as stacked bars; `bars` holds (name, seconds by phase)."""
    bars = [(name, phases) for name, phases in bars if phases]
    if not bars:
        return ""
    names = in_order(phase for _, phases in bars for phase in phases)
    longest = max(sum(phases.values()) for _, phases in bars)
    units = ((300, "seconds", 1.0), (7200, "minutes", 60.0), (math.inf, "hours", 3600.0))
    unit, scale = next((unit, scale) for most, unit, scale in units if longest < most)

    def draw(ax: Any) -> None:
        bottom = np.zeros(len(bars))
        for i, phase in enumerate(names):
            height = np.asarray([phases.get(phase, 0.0) / scale for _, phases in bars])
            ax.bar(range(len(bars)), height, 0.62, bottom, color=_SERIES[i % 8], label=phase)
            bottom += height
        shown = range(0, len(bars), math.ceil(len(bars) / 12))
        long = any(len(bars[i][0]) > 10 for i in shown) and len(shown) > 3
        ax.set_xticks(
            list(shown),
            [_cut(bars[i][0]) for i in shown],
            rotation=25 if long else 0,
            ha="right" if long else "center",
        )
        ax.set_xlim(-0.6, max(len(bars), 3) - 0.4)
        ax.set_ylabel(f"{label} ({unit})")
        _legend(ax, reverse=True)

    return _svg(label, draw)


def _svg(title: str, draw: Callable[[Any], None]) -> Figure:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({**_RC, "svg.hashsalt": title}):
        figure = Canvas(figsize=(6.4, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Makes matplotlib's SVG file part of the page: no prolog, no URLs, its own ids, the page's colours."""
    prefix = re.sub(r"\W+", "-", title).strip("-").lower()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">',
        svg,
        count=1,
    )
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg


def _spans(rounds: Sequence[Round]) -> list[tuple[Round, float, float, float]]:
    """Rounds with training rows: what to add to their steps, where they begin and end on one common axis."""
    spans: list[tuple[Round, float, float, float]] = []
    end = 0.0
    for round_ in rounds:
        rows = [row for row in round_.rows if row.get("kind") == "train"]
        at = [step for row in rows if (step := number(row, "step")) is not None]
        if at:
            # a run whose steps go on counting over the rounds needs no shift, but the axis must not go back
            shift = end if min(at) <= end else 0.0
            spans.append((round_, shift, end, shift + max(at)))
            end = spans[-1][3]
    return spans


def _curve(round_: Round, key: str, offset: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = []
    for row in round_.rows:
        step, value = number(row, "step"), number(row, key)
        if row.get("kind") == "train" and step is not None and value is not None and math.isfinite(value):
            points.append((step + offset, value))
    x, y = np.asarray(points, np.float64).reshape(-1, 2).T
    return x, y


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.asarray([x[part].mean() for part in parts]), np.asarray([y[part].mean() for part in parts])


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred moving average over a ninth of the points, narrower towards the ends."""
    half = len(y) // 18
    return np.asarray([y[i - w : i + w + 1].mean() for i in range(len(y)) for w in [min(half, i, len(y) - 1 - i)]])


def _ticks(last: int) -> list[int]:
    return list(range(0, last + 1, math.ceil((last + 1) / 16)))


def _cut(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _legend(ax: Any, *, reverse: bool = False) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if reverse:
        handles, labels = handles[::-1], labels[::-1]
    if len(handles) > 1:
        ax.legend(
            handles,
            [_cut(name) for name in labels],
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.2,
        )

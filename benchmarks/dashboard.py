"""Writes the dashboard for Grafana, and draws the same panels from a Prometheus where there is no Grafana.

    python -m benchmarks.dashboard --write
    python -m benchmarks.dashboard --prometheus http://127.0.0.1:9090 --out docs/dashboard.png [--minutes 10]

The picture asks Prometheus exactly what the panels ask, over the last minutes.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from benchmarks.dashboard_panels import EVERYTHING, ROWS, VARIABLES, Panel, Query, grafana_document

DASHBOARD = Path(__file__).resolve().parents[1] / "docker" / "grafana" / "dashboards" / "secateur.json"
# At a scrape every 5 seconds, Grafana's own choice for short spans.
RATE_INTERVAL = "30s"
STEPS = 150
INCHES_PER_UNIT = 0.36
LEGEND_ROWS = 8
UNITS = {"reqps": "per second", "s": "seconds", "bytes": "MB", "percentunit": "%", "none": "", "short": ""}
SCALES = {"bytes": 1e-6, "percentunit": 100.0}
COLOURS = {"green": "#3b8f4d", "red": "#c4372d", "orange": "#d08215", "blue": "#31588f"}

Series = list[tuple[str, list[float], list[float]]]


def written() -> str:
    """The text of the dashboard's file."""
    return json.dumps(grafana_document(), indent=2, ensure_ascii=False) + "\n"


def plain(expr: str) -> str:
    """A panel's expression with its variables filled in: everything, and the usual interval."""
    for name in VARIABLES:
        expr = expr.replace(f"${name}", EVERYTHING)
    return expr.replace("$__rate_interval", RATE_INTERVAL)


class Prometheus:
    """The HTTP API of a Prometheus. Raises OSError if it does not answer."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._opener = build_opener(ProxyHandler({}))

    def _ask(self, path: str, **parameters: object) -> list[dict[str, Any]]:
        with self._opener.open(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def now(self, query: Query) -> Series:
        """Each series' latest value."""
        found = self._ask("query", query=plain(query.expr))
        return sorted(
            (name_of(query, one["metric"]), [float(one["value"][0])], [number(one["value"])]) for one in found
        )

    def over(self, query: Query, seconds: float) -> Series:
        """Each series over the last seconds: its name, times and values."""
        end = time.time()
        step = max(seconds / STEPS, 1)
        found = self._ask("query_range", query=plain(query.expr), start=end - seconds, end=end, step=step)
        return sorted(
            (name_of(query, one["metric"]), [float(at) - end for at, _ in one["values"]], [*map(number, one["values"])])
            for one in found
        )


def number(sample: list[Any]) -> float:
    """The value of a sample [time, text]."""
    return float(sample[1])


def name_of(query: Query, labels: dict[str, str]) -> str:
    """A series' name by its query's legend."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), query.legend)


def draw(prometheus: Prometheus, out: Path, minutes: float) -> None:
    """All rows of the dashboard as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(17, INCHES_PER_UNIT * sum(row.height for row in ROWS)), layout="constrained")
        strips = figure.subfigures(len(ROWS), 1, height_ratios=[row.height for row in ROWS])
        for strip, row in zip(strips, ROWS, strict=True):
            strip.suptitle(row.title, x=0.005, ha="left", fontsize=11)
            axes = strip.subplots(1, len(row.panels), squeeze=False)[0]
            for axis, panel in zip(axes, row.panels, strict=True):
                axis.set_title(panel.title, loc="left")
                if panel.kind == "lines":
                    _lines(axis, panel, prometheus, 60 * minutes)
                else:
                    latest = [found for query in panel.queries for found in prometheus.now(query)]
                    (_stat if panel.kind == "stat" else _bars)(axis, panel, latest)
        figure.savefig(out, dpi=90)
        pyplot.close(figure)


def _lines(axis: Any, panel: Panel, prometheus: Prometheus, seconds: float) -> None:
    scale = SCALES.get(panel.unit, 1)
    colours: dict[str, str] = {}
    for name, times, values in (series for query in panel.queries for series in prometheus.over(query, seconds)):
        whose = name.removesuffix(" upper").removesuffix(" lower")
        colour = colours.setdefault(whose, f"C{len(colours)}")
        look = {"label": name, "linewidth": 1.2} if whose == name else {"linestyle": ":", "linewidth": 0.9}
        axis.plot([at / 60 for at in times], [scale * value for value in values], color=colour, **look)
    axis.set_xlim(-seconds / 60, 0)
    axis.set_ylabel(UNITS[panel.unit])
    axis.set_xlabel("minutes")
    names = axis.get_legend_handles_labels()[1]
    if names:
        columns = math.ceil(len(names) / LEGEND_ROWS)
        axis.legend(fontsize=6.5, frameon=False, loc="upper left", ncols=columns, handlelength=1)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0), high + (high - low) * 0.13 * math.ceil(len(names) / columns))
    else:
        _nothing(axis)


def _bars(axis: Any, panel: Panel, latest: Series) -> None:
    if not latest:
        _nothing(axis)
        return
    scale = SCALES.get(panel.unit, 1)
    names, sizes = [name for name, _, _ in latest], [scale * values[0] for _, _, values in latest]
    bars = axis.barh(names, sizes, color=COLOURS["blue"])
    axis.bar_label(bars, fmt="%.3g", padding=2)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(UNITS[panel.unit])


def _stat(axis: Any, panel: Panel, latest: Series) -> None:
    axis.set_axis_off()
    words, scale = dict(panel.words), SCALES.get(panel.unit, 1)
    for place, (name, _, values) in enumerate(latest):
        colour = next((colour for at, colour in reversed(panel.limits) if values[0] >= at), "blue")
        text = words.get(f"{values[0]:g}", f"{scale * values[0]:.3g} {UNITS[panel.unit]}".rstrip())
        shown = name if panel.says_name else f"{text}  {name}" if len(latest) > 1 else text
        size = 20 if len(latest) == 1 else 10
        height = 0.5 if len(latest) == 1 else 0.9 - 0.9 * place / len(latest)
        axis.text(0.02, height, shown, transform=axis.transAxes, fontsize=size, color=COLOURS[colour], va="center")
    if not latest:
        _nothing(axis)


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", va="center", color="grey")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write Grafana's file")
    parser.add_argument("--prometheus", help="where to draw from")
    parser.add_argument("--out", type=Path, help="the picture")
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    if arguments.write:
        DASHBOARD.write_text(written(), encoding="utf-8")
    if arguments.prometheus and arguments.out:
        draw(Prometheus(arguments.prometheus), arguments.out, arguments.minutes)
    elif not arguments.write:
        parser.error("say --write, or --prometheus and --out")


if __name__ == "__main__":
    main()

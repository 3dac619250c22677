"""The page of an experiment: complete in every mode, safe with hostile names, readable for everybody."""

import base64
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from service.experiments import charts
from service.experiments.charts import Bar
from service.experiments.document import Decided, LookReport, Quantiles, ReportLine
from service.experiments.page import CSP, REFRESH_SECONDS, list_page, render
from service.experiments.phrases import evidence, headline, milliseconds, number, p_value, points, stand
from tests.service.experiments import reports
from tests.service.experiments.reports import FULL, PRUNED, report
from tests.service.outline import Outline, colours, contrast

MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "shadow": reports.shadow,
    "split": reports.split,
    "inferior": reports.inferior,
    "cascade": reports.cascade,
    "empty split": reports.empty,
    "empty shadow": lambda: reports.empty("shadow"),
    "empty cascade": lambda: reports.empty("cascade"),
}
HOSTILE = "<script>alert('1')</script>\"'&<b onload=x>"


def line(document: dict[str, Any]) -> ReportLine:
    return ReportLine(**{name: document[name] for name in ReportLine.model_fields})


def words_of(page: str) -> str:
    return " ".join(" ".join(Outline(page).text).replace("\u00a0", " ").split())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_verdict_and_well_formed_parts(mode: str) -> None:
    found = report(MODES[mode]())
    outline = Outline(render(found))
    text = words_of(render(found))
    assert headline(found) in text
    assert found.words in text
    assert outline.tags.count("h1") == outline.tags.count("main") == outline.tags.count("header") == 1
    assert outline.tags.count("table") == outline.tags.count("caption") >= 1
    assert "None" not in text
    assert "nan" not in text.split()


@pytest.mark.parametrize(
    ("mode", "sections"),
    [
        ("shadow", ["Accuracy", "Traffic", "Latency", "Memory", "By class", "Disagreements", "History"]),
        ("split", ["Accuracy", "Traffic", "Latency", "Memory", "By class", "History"]),
        ("empty split", ["Accuracy", "Traffic", "Latency", "Memory"]),
    ],
)
def test_a_section_is_there_if_it_has_something_to_show(mode: str, sections: list[str]) -> None:
    assert re.findall(r"<h2 id=[^>]*>(.*?)</h2>", render(report(MODES[mode]())))[1:] == sections


def test_the_page_says_what_the_report_says() -> None:
    text = words_of(render(report(reports.shadow())))
    for said in (
        "May sentiment-pruned replace sentiment-full?",
        "First decided at 3,120 units, 2026-01-01 10:15:00 UTC: non-inferior.",
        "0.00 between \u22120.82 and +0.82",
        "Evidence against a greater loss: 344.8, of 40.0 needed.",
        "96.8 % [96.3, 97.2] of the items",
        "control right 4,410 75 control wrong 75 440",
        "231.7 MB instead of 402.7 MB, 42.4 % less",
        "Both arms ran on one device at the same time",
        "positive neutral 61 43.0",
        "312 repeats of a unit, 4 items that named a deployment. Dropped: 41 busy.",
    ):
        assert said in text


def test_a_split_shows_counts_against_weights_and_what_is_needed() -> None:
    text = words_of(render(report(reports.split())))
    assert "Not decided yet" in text
    assert "About 24,300 more units are needed" in text
    assert "5,200 of about 30,000 units" in text
    assert "The units fit the weights: chi-square 0.69, p 0.405" in text
    assert "2,630 units" in text
    assert "Right answers, % 90.0 \u2192 89.1 control \u2192 candidate" in text


def test_an_alarm_of_the_sample_ratio_is_told() -> None:
    srm = {
        "counts": {FULL: 5000, PRUNED: 5500},
        "chi_square": 23.81,
        "p_value": 1e-6,
        "e_value": 15_561.0,
        "alarm": True,
    }
    page = render(report(reports.split(), srm=srm, verdict="invalid"))
    assert "This comparison is not valid" in words_of(page)
    assert "The units do not fit the weights (chi-square 23.81, p < 0.001; sequential evidence 15,561" in words_of(page)
    assert page.count('<p class="alarm">') == 1


def test_a_cascade_says_where_items_were_answered_and_compares_nothing() -> None:
    text = words_of(render(report(reports.cascade())))
    assert "How much can sentiment-pruned answer before sentiment-full is asked?" in text
    assert "The candidate answers 71.2 %" in text
    assert "Too early" not in text
    assert "accepted 3,702 71.2" in text


def test_classes_with_a_regression_come_first_and_the_rest_by_what_is_lost() -> None:
    page = render(report(reports.inferior()))
    shown = re.findall(r'<th scope="row">(class \d+)</th>', page)
    assert shown[:3] == ["class 9", "class 29", "class 28"]
    assert len(shown) == 30
    assert page.count('<tr class="mark">') == 1
    assert "<summary>10 more</summary>" in page


def test_a_winner_is_named_and_an_ended_page_does_not_ask_again() -> None:
    ended = report(reports.shadow(), state="stopped", winner=PRUNED)
    assert stand(ended) == "ended: sentiment-pruned answers"
    assert "http-equiv" not in render(ended)
    assert "every 10 seconds" not in render(ended)


def test_a_running_page_asks_again_unless_it_is_held_still() -> None:
    running = report(reports.shadow())
    assert f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' in render(running)
    assert 'href="?refresh=off"' in render(running)
    assert "http-equiv" not in render(running, refreshes=False)
    assert "http-equiv" not in list_page([line(reports.shadow())], refreshes=False)
    assert "http-equiv" in list_page([line(reports.shadow())])
    assert "http-equiv" not in list_page([])


def test_the_list_links_every_experiment_and_says_its_verdict() -> None:
    page = list_page([line(make()) for make in (reports.shadow, reports.split, reports.cascade)])
    assert re.findall(r'href="(experiments/[^"]+)"', page) == [
        "experiments/prune16",
        "experiments/ab-sentiment",
        "experiments/cascade-4",
    ]
    text = words_of(page)
    for said in ("Yes: not worse than allowed", "Not decided yet", "Arms are not compared"):
        assert said in text
    assert "No experiment is configured" in words_of(list_page([]))


def poisoned(value: Any, path: str = "") -> Any:
    """The document with every free text replaced by markup; words that the schema fixes, and names, stay."""
    fixed = {
        "at",
        "role",
        "mode",
        "state",
        "metric",
        "method",
        "verdict",
        "deployment",
        "control",
        "candidate",
        "basis",
    }
    if isinstance(value, dict):
        return {name: poisoned(inner, f"{path} {name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, path) for inner in value]
    return HOSTILE + path if isinstance(value, str) and path.split()[-1] not in fixed else value


@pytest.mark.parametrize("mode", MODES)
def test_names_and_labels_are_text_and_never_markup(mode: str) -> None:
    clean = Outline(render(report(MODES[mode]())))
    document = poisoned(MODES[mode]()) | {"winner": HOSTILE}
    hostile = Outline(render(report(document)))
    assert hostile.tags == clean.tags
    assert hostile.attributes == clean.attributes
    assert HOSTILE in "".join(hostile.text)
    listed = list_page([line(document)])
    assert Outline(listed).tags == Outline(list_page([line(MODES[mode]())])).tags


def test_hostile_deployment_names_are_text_too() -> None:
    document = reports.shadow()
    text = report(document).model_dump_json().replace(FULL, HOSTILE.replace('"', "")).replace(PRUNED, "<i>")
    hostile = Outline(render(type(report(document)).model_validate_json(text)))
    assert hostile.tags == Outline(render(report(document))).tags


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_admits_the_style_and_the_page_needs_nothing_else(mode: str) -> None:
    page = render(report(MODES[mode]()))
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in CSP
    assert CSP.startswith("default-src 'none'; ")
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe", "form"} & set(outline.tags)
    assert "style" not in outline.attributes
    assert not re.search(r"https?://|@import|url\(", page)
    assert set(outline.links) <= {"../experiments", "?refresh=off", "?format=json"}


def test_both_colour_schemes_define_every_colour() -> None:
    page = render(report(reports.shadow()))
    light, dark = colours(page)
    assert light.keys() == dark.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", page)) <= light.keys()


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize(
    ("front", "back", "least"),
    [
        *(("ink", back, 4.5) for back in ("page", "hue-soft", "warn-soft", "calm-soft")),
        *(("soft", back, 4.5) for back in ("page", "hue-soft", "warn-soft", "calm-soft")),
        ("hue", "page", 4.5),
        ("warn", "page", 4.5),
        ("warn", "warn-soft", 4.5),
        ("other", "page", 3.0),
        ("hue", "calm-soft", 3.0),
        ("other", "calm-soft", 3.0),
    ],
)
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(scheme: int, front: str, back: str, least: float) -> None:
    found = colours(render(report(reports.shadow())))[scheme]
    assert contrast(found[front], found[back]) >= least


def look(units: int, estimate: float, half: float) -> LookReport:
    return LookReport(
        units=units,
        at="",
        estimate=estimate,
        lower=max(estimate - half, -1),
        upper=min(estimate + half, 1),
        verdict="undecided",
    )


def points_of(svg: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'class="{kind}" points="([^"]*)"', svg)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def line_at(svg: str, kind: str) -> dict[str, float]:
    found = re.search(rf'<line class="{kind}" x1="([\d.]+)%?" y1="([\d.]+)" x2="([\d.]+)%?" y2="([\d.]+)"', svg)
    assert found is not None
    return dict(zip(("x1", "y1", "x2", "y2"), map(float, found.groups()), strict=True))


def test_the_curve_of_the_difference_is_to_scale() -> None:
    timeline = [look(250, 0.02, 0.5), look(500, 0.0, 0.04), look(1000, -0.01, 0.02)]
    decided = Decided(verdict="non_inferior", units=500, at="2026-01-01T00:00:00Z")
    svg = charts.difference(timeline, 0.02, decided)
    middle, band = points_of(svg, "estimate"), points_of(svg, "band")
    assert [x for x, _ in middle] == [250, 500, 1000]
    upper, lower = band[:3], band[:2:-1]
    # A point of accuracy is as many pixels everywhere, and up is better.
    pixels = (middle[2][1] - upper[2][1]) / 0.02
    assert pixels > 0
    assert lower[2][1] - middle[2][1] == pytest.approx(0.02 * pixels, abs=0.2)
    assert upper[1][1] == pytest.approx(middle[1][1] - 0.04 * pixels, abs=0.2)
    assert line_at(svg, "zero")["y1"] == pytest.approx(middle[1][1], abs=0.1)
    assert line_at(svg, "margin")["y1"] == pytest.approx(middle[1][1] + 0.02 * pixels, abs=0.2)
    assert line_at(svg, "decided")["x1"] == 50
    assert "non-inferior at 500" in svg
    earlier = [row.model_copy(update={"at": "2026-01-02T00:00:00Z"}) for row in timeline]
    assert "non-inferior" not in charts.difference(earlier, 0.02, decided)
    # The first look is wider than the frame, which is set by those that have settled.
    assert 0 < min(y for _, y in upper[1:]) < charts.PLOT
    assert "3 looks up to 1,000 units. Now \u22121.00 points, between \u22123.00 and +1.00" in svg


def test_a_single_look_and_an_interval_without_information_are_drawn() -> None:
    svg = charts.difference([look(1, 0.0, 1.0)], 0.01, None)
    assert points_of(svg, "estimate") == [(1000, line_at(svg, "zero")["y1"])]
    assert 0 < line_at(svg, "whisker")["y2"] < charts.PLOT or line_at(svg, "whisker")["y1"] <= charts.PLOT
    Outline(svg)


def test_the_curve_of_latencies_is_to_scale() -> None:
    curve = [float(rank) for rank in range(1, 100)]
    interval = (40.0, 60.0)
    found = Quantiles(
        n=100,
        p50=50.0,
        p95=95.0,
        p99=99.0,
        p50_interval=interval,
        p95_interval=(90, None),
        p99_interval=(None, None),
        curve=curve,
    )
    svg = charts.latency([("a", "control", found), ("b", "candidate", found.model_copy(update={"curve": []}))])
    drawn = points_of(svg, "control")
    assert len(drawn) == 99
    # From 1 to 99 ms, each doubling has the same width.
    assert [x for x, _ in drawn] == pytest.approx([1000 * math.log(rank, 99) for rank in range(1, 100)], abs=0.1)
    height = charts.PLOT - charts.TOP
    assert [y for _, y in drawn] == pytest.approx(
        [charts.PLOT - height * rank / 100 for rank in range(1, 100)], abs=0.1
    )
    middle = line_at(svg, "control whisker")
    assert (middle["x1"], middle["x2"]) == pytest.approx((100 * math.log(40, 99), 100 * math.log(60, 99)), abs=0.1)
    assert "a, control: half within 50.0 ms, 95 % within 95.0 ms" in svg
    assert "candidate" not in svg


def test_an_axis_of_latencies_names_round_numbers() -> None:
    assert charts.Logarithmic([0.3, 60.0], 1000).ticks() == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])
    narrow = charts.Logarithmic([6.1, 7.9], 1000)
    assert narrow.ticks() == pytest.approx([1, 2, 5])
    assert narrow(7.9) == pytest.approx(1000)
    assert charts.Logarithmic([0.0, 0.0], 1000)(0.0) == 0


def test_bars_are_as_long_as_their_values() -> None:
    svg = charts.bars("k", "t", [Bar("a", "control", 400, "400"), Bar("b", "candidate", 100, "100", mark=200)])
    assert re.findall(r'class="(?:control|candidate)"[^>]*width="([\d.]+)%"', svg) == ["100.00", "25.00"]
    assert line_at(svg, "mark-line")["x1"] == 50


def test_numbers_as_people_read_them() -> None:
    assert [number(x) for x in (0.04, -0.04, 0.05001, -1.25)] == ["0.0", "0.0", "+0.1", "\u22121.2"]
    assert [points(x) for x in (0.0, -0.008154, 1e-9)] == ["0.00", "\u22120.82", "0.00"]
    assert [p_value(x) for x in (None, 0.0, 0.0499)] == ["\u2013", "< 0.001", "0.050"]
    assert [milliseconds(x) for x in (None, 0.5, 12.34, 1234.5)] == ["\u2013", "0.50", "12.3", "1,234"]
    assert milliseconds(12.34, (12.0, None)) == "12.3 [12.0, \u2013]"
    assert [evidence(x) for x in (0.3, 344.76, 15_561.2, 3e9)] == ["0.3", "344.8", "15,561", "3e+09"]

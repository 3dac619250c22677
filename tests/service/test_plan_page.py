"""The page of a plan: well-formed, complete, readable without colours, without a network and without the plot."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.html import Scale
from service.plan_page import FRONT_COLUMNS, front_rows, render, verdict, watched_lines
from tests.service.outline import Outline, colours, contrast

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser")


def point(name: str, size: int, accuracy: float, lower: float, experts: tuple[int, ...] = (4, 4)) -> dict[str, Any]:
    return {
        "name": name,
        "method": name.split()[0],
        "semantics": "zero",
        "keep": 0.5,
        "allocation": "uniform",
        "options": {},
        "bytes": size,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "difference": {"value": -0.002, "lower": lower, "gained": 1, "lost": 2, "rows": 400, "groups": 90},
        "flops_per_token": size // 8,
        "experts": list(experts),
        "latency": {"single_seconds": 0.002, "batch_seconds": 0.02, "batch_rows": 32},
    }


def tried(name: str, state: str, reason: str, rows: int = 100) -> dict[str, Any]:
    known = {"bytes": 1000, "accuracy": 0.9} if rows else {"bytes": None, "accuracy": None}
    return {"name": name, "method": name.split()[0], "state": state, "reason": reason, "rows": rows, **known}


@pytest.fixture
def plan() -> dict[str, Any]:
    """What a planner writes, with a name that would break a page that trusts names."""
    return {
        "request": {"parent": "<b>full</b>", "tolerance": 1.0, "dev": {"name": "rows.jsonl"}},
        "machine": {"cpu": "x86_64", "threads": 2, "device": "cpu", "backend": "cpu", "dtype": "float32"},
        "rows": {
            "calibration": 256,
            "dev": 600,
            "choosing": 200,
            "confirming": 400,
            "confirming_groups": 90,
            "needed_at_least": 301,
            "test": 0,
        },
        "parent": point("none none keep 1", 7_400_000, 0.95, 0.0, (16, 16)) | {"difference": None},
        "front": [
            point("hc-smoe zero keep 0.25", 3_000_000, 0.93, -0.02),
            point("frequency zero keep 0.5", 4_900_000, 0.948, -0.00549, (8, 7)),
            point("mone constant keep 0.5", 5_000_000, 0.948, -0.00549, (8, 8)),
        ],
        "ladder": [
            {"name": "frequency zero keep 0.5", "result": "passed"},
            {"name": "hc-smoe zero keep 0.25", "result": "failed"},
        ],
        "chosen": "frequency zero keep 0.5",
        "reference": "mone constant keep 0.5",
        "behind_reference": False,
        "smallest": "frequency zero keep 0.5",
        "child": {"path": "child", "artifact_sha256": "0" * 64, "experts_kept": [8, 7]},
        "router_norm_change": [
            {
                "keep": 0.5,
                "rows": 200,
                "accuracy": 0.94,
                "random": 0.93,
                "parent": 0.95,
                "ahead": False,
                "behind": False,
            }
        ],
        "tried": [
            tried("frequency zero keep 0.5", "front", ""),
            tried("router-norm-change zero keep 0.5", "impossible", "layer 0: <routers> are equal", rows=0),
            tried("random zero keep 0.5", "dropped", "in the worse half of its size after 25 rows"),
        ],
        "left_out": {"eep": "ask for it with --thorough"},
    }


def test_the_page_has_a_title_tables_and_plots_in_words(plan: dict[str, Any]) -> None:
    page = render(plan)
    outline = Outline(page)
    assert page.startswith("<!doctype html>")
    assert '<html lang="en">' in page
    assert "<title>Plan for &lt;b&gt;full&lt;/b&gt; on rows.jsonl</title>" in page
    assert outline.tags.count("h1") == 1
    assert outline.tags.count("table") == outline.tags.count("caption") == 3
    assert outline.tags.count("svg") == len(outline.labels) == 4
    for label in outline.labels:
        assert "parent 95.0 %" in label
        assert "frequency zero keep 0.5 94.8 %" in label
    assert len([cost for cost in ("bytes", "FLOPs per token", "one row", "batch") if f"against {cost}" in page]) == 4


def test_nothing_is_fetched_and_nothing_runs(plan: dict[str, Any]) -> None:
    page = render(plan)
    outline = Outline(page)
    assert outline.links == []
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert not re.search(r"https?://|@import|url\(", page)


def test_names_are_text_and_never_markup(plan: dict[str, Any]) -> None:
    page = render(plan)
    assert "<b>" not in page
    assert "<routers>" not in page
    assert "&lt;routers&gt; are equal" in page


def test_both_colour_schemes_define_every_colour(plan: dict[str, Any]) -> None:
    light, dark = re.findall(r":root\{(.*?)\}", render(plan), re.DOTALL)
    assert set(re.findall(r"--([\w-]+):", light)) == set(re.findall(r"--([\w-]+):", dark))
    assert set(re.findall(r"var\(--([\w-]+)\)", render(plan))) <= set(re.findall(r"--([\w-]+):", light))


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize(
    ("front", "back"), [("ink", "page"), ("soft", "page"), ("ink", "hue-soft"), ("ink", "warn-soft")]
)
def test_text_has_the_contrast_that_wcag_asks_for(scheme: int, front: str, back: str, plan: dict[str, Any]) -> None:
    found = colours(render(plan))[scheme]
    assert contrast(found[front], found[back]) >= 4.5


def test_the_verdict_rounds_the_bound_against_us(plan: dict[str, Any]) -> None:
    said = verdict(plan)
    assert "frequency by zero, 8, 7 experts: 4.9 MB instead of 7.4 MB, 34 % less" in said
    assert "-0.2 points" in said
    assert "no more than 0.6 points lower; 1 were allowed" in said
    assert "One row takes 2.0 ms instead of 2.0 ms" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {},
            "it is not behind the most faithful child of half the experts, mone constant keep 0.5, 5.0 MB.",
        ),
        ({"behind_reference": True}, "On all 600 dev rows it is behind the most faithful child of half the experts"),
        (
            {"reference": "frequency zero keep 0.5"},
            "child of half the experts, and on all 600 dev rows no smaller one that passed was as good.",
        ),
        (
            {"smallest": "hc-smoe zero keep 0.25"},
            "Smaller, and within the tolerance too, but behind that child: hc-smoe zero keep 0.25, 3.0 MB.",
        ),
    ],
)
def test_the_verdict_tells_of_half_the_experts_and_of_what_is_smaller(
    change: dict[str, Any], words: str, plan: dict[str, Any]
) -> None:
    said = verdict(plan | change)
    assert words in said
    assert words in " ".join(Outline(render(plan | change)).text)
    assert ("Smaller, " in said) == ("<code>child</code> and <code>smallest</code>" in render(plan | change))


def test_without_a_child_of_half_the_experts_nothing_is_said_of_it(plan: dict[str, Any]) -> None:
    assert "half" not in verdict(plan | {"reference": None, "behind_reference": None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "the safest candidate, frequency zero keep 0.5, may be 0.6 points worse"),
        ({"ladder": []}, "every candidate lost clearly more than 1 points"),
        (
            {"rows": {"needed_at_least": 500, "confirming": 400}},
            "400 rows confirm, and to rule out a loss of 1 points 500 are",
        ),
        ({"rows": {"needed_at_least": None, "confirming": 400}}, "no number is enough"),
    ],
)
def test_nothing_passing_says_why_and_what_to_do(change: dict[str, Any], words: str, plan: dict[str, Any]) -> None:
    failed = (
        copy.deepcopy(plan)
        | {"chosen": None, "child": None, "smallest": None}
        | {k: v for k, v in change.items() if k != "rows"}
    )
    failed["rows"] |= change.get("rows", {})
    said = verdict(failed)
    assert said.startswith("Nothing passes: ")
    assert words in said
    assert "--tolerance" in said
    assert words in " ".join(Outline(render(failed)).text)


def test_the_table_has_the_parent_first_and_marks_the_chosen(plan: dict[str, Any]) -> None:
    rows = list(front_rows(plan))
    names = ["parent", "hc-smoe zero keep 0.25", "frequency zero keep 0.5", "mone constant keep 0.5"]
    assert [row[0] for row in rows] == names
    assert all(len(row) == len(FRONT_COLUMNS) for row in rows)
    assert [row[-1] for row in rows] == ["", "", "chosen", "reference"]
    smaller = list(front_rows(plan | {"smallest": "hc-smoe zero keep 0.25"}))
    assert [row[-1] for row in smaller] == ["", "smallest", "chosen", "reference"]
    assert rows[2][3] == "94.8 [92.8, 96.8]"
    assert render(plan).count('<tr class="mark">') == 1


@pytest.mark.parametrize(
    ("ahead", "behind", "words"),
    [
        (True, False, "; ahead of random."),
        (False, True, "misleads here."),
        (False, False, "not told apart from random"),
    ],
)
def test_a_ranking_that_means_nothing_is_called_so(ahead: bool, behind: bool, words: str, plan: dict[str, Any]) -> None:
    plan["router_norm_change"][0] |= {"ahead": ahead, "behind": behind}
    (line,) = watched_lines(plan)
    assert words in line
    assert words in " ".join(Outline(render(plan)).text)


def test_a_ranking_that_was_refused_says_why(plan: dict[str, Any]) -> None:
    plan["router_norm_change"] = []
    assert watched_lines(plan) == ["Router-norm change was not compared with random: layer 0: <routers> are equal"]


def test_a_scale_spans_its_frame_and_names_round_numbers() -> None:
    scale = Scale([0.91, 0.95], 200, 10)
    assert 10 < scale(0.95) < scale(0.91) < 200
    assert scale.ticks() == pytest.approx([0.91, 0.92, 0.93, 0.94, 0.95])
    assert np.isfinite([Scale([5.0, 5.0], 0, 1)(5.0), Scale([0.0], 0, 1, from_zero=True)(0.0)]).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(scheme: str, plan: dict[str, Any], tmp_path: Path) -> None:
    """A screenshot in each scheme: the right ground, and a good deal of ink on it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    page, shot = tmp_path / "plan.html", tmp_path / "plan.png"
    page.write_text(render(plan), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1800"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--blink-settings=preferredColorScheme=" + "01"[scheme == "light"],
    ]
    command = [browser, *options, f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    from matplotlib.image import imread

    pixels_YXC = np.asarray(imread(shot))[..., :3]
    ground = pixels_YXC[2, 2].mean()
    assert ground > 0.9 if scheme == "light" else ground < 0.15
    assert 0.02 < (np.abs(pixels_YXC.mean(-1) - ground) > 0.3).mean() < 0.5

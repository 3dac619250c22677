"""The page in a real browser: it fits every width, breaks no policy, and follows live traffic to a verdict.

With EXPERIMENT_PNG=docs/experiment.png in the environment, more traffic is sent and the page is kept as that picture.
"""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from service.experiments import page as page_module
from service.experiments import refresh
from service.experiments.page import render
from tests.service.conftest import Harness, Start
from tests.service.experiments import reports
from tests.service.experiments.live import no_cache, report_when, send_labels, shadow, swayed_loader
from tests.service.experiments.reports import report
from tests.service.toys import LABELS

CHROMIUM = Path("/usr/bin/chromium")
KEEP = os.environ.get("EXPERIMENT_PNG")
MILLISECONDS = 120_000 if KEEP else 20_000
# A picture is worth waiting for: with a narrow margin the curve shows how the interval closes.
REQUESTS, MARGIN = (1500, 0.02) if KEEP else (150, 0.1)
WIDTH = 1100


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    if not CHROMIUM.exists():
        pytest.skip("no chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.set_default_timeout(MILLISECONDS)
    yield page
    page.close()


@pytest.mark.parametrize("width", [320, 1200])
@pytest.mark.parametrize("mode", ["shadow", "inferior", "cascade", "empty"])
def test_nothing_sticks_out_of_a_narrow_page_or_a_wide_one(mode: str, width: int, page: Page) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.set_content(render(report(getattr(reports, mode)())))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in page.locator("main svg").all():
        box = part.bounding_box()
        assert box is None or box["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_takes_the_reader_s_colours(scheme: Any, browser: Browser) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.set_content(render(report(reports.shadow())))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(252, 252, 251)" if scheme == "light" else "rgb(23, 24, 23)")
    page.close()


class Traffic(threading.Thread):
    """Texts that are asked once each, with their true labels: both arms are wrong now and then, rarely together."""

    def __init__(self, harness: Harness, requests: int) -> None:
        super().__init__()
        self.harness = harness
        self.requests = requests

    def run(self) -> None:
        chance = random.Random(3)
        for number in range(self.requests):
            word = chance.choices(range(3), (5, 3, 4))[0]
            is_swayed = chance.random() < 0.01
            answer = self.harness.classify(f"{word} {1000 + number}" + (" 77" if is_swayed else "")).json()
            truth = LABELS[word] if chance.random() < 0.93 else chance.choice(LABELS)
            if is_swayed and chance.random() < 0.4:
                truth = LABELS[(word + 1) % 3]
            send_labels(self.harness, [{"id": answer["id"], "label": truth}])


def keep(page: Page, url: str, path: str) -> None:
    """The top of the page, to the end of the section on accuracy, a little sharper than a screen."""
    browser = page.context.browser
    assert browser is not None
    sharp = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.5)
    sharp.goto(f"{url}/experiments/exp")
    box = sharp.locator("section[aria-labelledby=accuracy]").bounding_box()
    assert box is not None
    sharp.screenshot(
        path=path, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
    )
    sharp.close()


def test_the_verdict_changes_under_the_reader_s_eyes(start: Start, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "REFRESH_SECONDS", 1)
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.1)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    with no_cache():
        harness = start(swayed_loader(), experiments=shadow(margin=MARGIN), engine={"shadow_queue_items": 1000})
        answer = page.goto(f"{harness.server.url}/experiments")
        assert answer is not None
        assert answer.headers["content-security-policy"] == page_module.CSP
        page.get_by_role("link", name="exp").click()
        page.wait_for_url("**/experiments/exp")
        verdict = page.locator("#verdict")
        assert verdict.inner_text() == "Too early to say"
        traffic = Traffic(harness, REQUESTS)
        traffic.start()
        # The page asks again by itself: nobody reloads it here.
        page.get_by_role("heading", name="Yes: not worse than allowed").wait_for()
        assert page.locator("svg.plot").first.is_visible()
        traffic.join()
        words = report_when(harness, lambda found: found["units"] == REQUESTS)["words"]
        page.get_by_role("link", name="Hold it still").click()
        page.get_by_text("This page is held still").wait_for()
        assert page.locator("meta[http-equiv=refresh]").count() == 0
        assert words in page.locator("section.verdict").inner_text()
        if KEEP:
            keep(page, harness.server.url, KEEP)
    assert complaints == []

"""A page as a reader without eyes gets it, and its colours as WCAG sees them."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Tags must close in order, ids must be there once, drawings must have a name unless they are for the eye only."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.named: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        assert set(self.named) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "svg" and "svg" not in self.open and "aria-hidden" not in given:
            assert given["role"] == "img"
            self.labels.append(given.get("aria-label") or given["aria-labelledby"] or "")
        self._note(tag, given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def _note(self, tag: str, given: dict[str, str | None]) -> None:
        self.tags.append(tag)
        self.attributes |= given.keys()
        self.links += [value or "" for name, value in given.items() if name in ("src", "href", "action")]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.named += (given.get("aria-labelledby") or "").split()


def colours(page: str) -> list[dict[str, str]]:
    """Names and values of the light scheme and of the dark one."""
    schemes = [
        dict(re.findall(r"--([\w-]+):(#\w{6})", block)) for block in re.findall(r":root\{(.*?)\}", page, re.DOTALL)
    ]
    return schemes[:2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours written as #rrggbb."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

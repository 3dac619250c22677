"""Experiments of a running service: read the report, move the traffic, end them."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service.cli.arguments import JsonFlag
from service.cli.client import DEFAULT_URL, Client, KeyFile, ServerError, ServerUrl
from service.cli.output import PIPE_COLUMNS, print_json, print_table

if TYPE_CHECKING:
    from pydantic import BaseModel

    from service.experiments.document import Report
    from service.experiments.tables import Table

    Read = TypeVar("Read", bound=BaseModel)

COLOURS = {
    "invalid": "bold red",
    "insufficient_data": "bold",
    "inferior": "bold red",
    "superior": "bold green",
    "non_inferior": "bold green",
    "undecided": "bold yellow",
}
LINE_WIDTH = 61


class Winner(StrEnum):
    """Which arm answers the task from now on."""

    CONTROL = "control"
    CANDIDATE = "candidate"


Name = Annotated[str, typer.Argument(help="The experiment's name in the configuration.", metavar="NAME")]


def report(
    name: Annotated[
        str | None, typer.Argument(help="The experiment; without one, all are listed.", metavar="[NAME]")
    ] = None,
    url: ServerUrl = DEFAULT_URL,
    key_file: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """What an experiment of a running service has found: the verdict, what it rests on, and what is missing.

    \b
    Example:
      secateur report prune16 --url http://127.0.0.1:8000
    """
    client = Client(url, key_file)
    body = client.get("experiments") if name is None else client.get("experiments", name)
    if as_json:
        print_json(json.loads(body))
    elif name is None:
        _print_list(body)
    else:
        _print_report(_read_report(body))


def promote(
    name: Name,
    to: Annotated[float | None, typer.Option(min=0, max=100, help="Percent of the traffic.", metavar="PERCENT")] = None,
    end: Annotated[Winner | None, typer.Option(help="End it: this arm answers the task from now on.")] = None,
    pause: Annotated[bool, typer.Option("--pause", help="Assign nobody until it is resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Assign again.")] = False,
    url: ServerUrl = DEFAULT_URL,
    key_file: KeyFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Take the next step of an experiment's ramp, or the one that an option names.

    The server must have admin.enabled; with keys, the key needs the scope admin.

    \b
    Example:
      secateur promote prune16 --to 50
      secateur promote prune16 --end candidate
    """
    if sum((to is not None, end is not None, pause, resume)) > 1:
        raise typer.BadParameter("give one of --to, --end, --pause and --resume")
    client = Client(url, key_file)
    change: dict[str, Any]
    if to is not None:
        change = {"traffic": to}
    elif end is not None:
        found = _read_report(client.get("experiments", name))
        change = {"winner": found.control if end is Winner.CONTROL else found.candidate}
    elif pause or resume:
        change = {"state": "paused" if pause else "running"}
    else:
        change = {"advance": True}
    client.patch("experiments", name, body=change)
    body = client.get("experiments", name)
    if as_json:
        print_json(json.loads(body))
    else:
        _print_stand(_read_report(body))


def _read(document: "type[Read]", body: bytes) -> "Read":
    from pydantic import ValidationError

    try:
        return document.model_validate_json(body)
    except ValidationError:
        raise ServerError(
            "the server's answer has another shape than this version knows: use the server's version"
        ) from None


def _read_report(body: bytes) -> "Report":
    from service.experiments.document import Report

    return _read(Report, body)


def _print_list(body: bytes) -> None:
    from service.experiments.document import ReportList
    from service.experiments.tables import list_table

    found = _read(ReportList, body).data
    if found:
        _print_table(list_table(found))
    else:
        typer.echo("No experiment is configured.")


def _print_report(found: "Report") -> None:
    from service.experiments import phrases
    from service.experiments.tables import tables

    _print_stand(found)
    first, needed = found.first_decided, found.needed
    said = [
        found.words,
        needed.words if needed and needed.words != found.words else None,
        f"First decided at {first.units:,} units, {phrases.when(first.at)}: {first.verdict}." if first else None,
        *(f"Warning: {warning}" for warning in found.warnings),
    ]
    _print_paragraphs(said)
    if found.difference is not None:
        _print_paragraphs([_number_line(found)], is_drawn=True)
    _print_paragraphs(
        [
            phrases.difference_words(found),
            phrases.agreement_words(found),
            phrases.srm_words(found.srm) if found.srm else None,
            phrases.srm_words(found.labels_srm, "labelled units") if found.labels_srm else None,
            phrases.latency_words(found),
            phrases.memory_words(found),
            phrases.left_out_words(found),
        ]
    )
    for table in tables(found):
        _print_table(table)


def _print_stand(found: "Report") -> None:
    from rich.text import Text

    from service.experiments import phrases

    ramp = phrases.ramp_words(found)
    facts = (
        f"{found.name}, revision {found.revision}",
        f"{found.mode} of task {found.task}",
        f"{phrases.percent(found.traffic)} of traffic" + (f" ({ramp})" if ramp else ""),
        f"{found.units:,} units",
        phrases.stand(found),
    )
    console = _console()
    console.print(Text(" \u00b7 ".join(facts)))
    console.print(Text(phrases.question(found)))
    console.print(Text(phrases.headline(found), style=COLOURS[found.verdict]))


def _print_paragraphs(said: "list[str | None]", is_drawn: bool = False) -> None:
    from rich.text import Text

    console = _console()
    for words in filter(None, said):
        console.print(Text(words), no_wrap=is_drawn)
    console.print()


def _print_table(table: "Table") -> None:
    print_table(table.caption, table.columns, table.rows, words=table.words)


def _console() -> Any:
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def _number_line(found: "Report") -> str:
    """The difference's interval between what may be lost and nothing lost, in letters."""
    from service.experiments.phrases import points

    assert found.difference is not None
    lower, upper, estimate = found.difference.lower, found.difference.upper, found.difference.estimate
    low, high = min(lower, -1.5 * found.margin), max(upper, 0.5 * found.margin)

    def place(value: float) -> int:
        return round((value - low) / (high - low) * (LINE_WIDTH - 1))

    line = [" "] * LINE_WIDTH
    line[place(lower) : place(upper) + 1] = "\u2500" * (place(upper) - place(lower) + 1)
    marks = ((0.0, "\u2502"), (-found.margin, "\u250a"), (lower, "\u251c"), (upper, "\u2524"), (estimate, "\u25cf"))
    for value, mark in marks:
        line[place(value)] = mark
    return (
        f"{points(low):>7} {''.join(line)} {points(high)}\n"
        "        \u25cf difference with its interval   \u2502 none   "
        f"\u250a the most that may be lost, {points(-found.margin)}"
    )

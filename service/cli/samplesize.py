"""Say how many units an experiment will need before it starts."""

from typing import Annotated, Any

import typer

from models.errors import ConfigError
from service.cli.arguments import JsonFlag
from service.cli.output import print_json, print_table


def samplesize(
    margin: Annotated[float, typer.Option(help="The greatest loss of accuracy you accept.")] = 0.01,
    accuracy: Annotated[float, typer.Option(help="Accuracy of the control, as you expect it.")] = 0.9,
    difference: Annotated[float, typer.Option(help="Candidate minus control, as you expect it.")] = 0.0,
    discordance: Annotated[float, typer.Option(help="Share of items that one side alone gets right.")] = 0.03,
    disagreement: Annotated[
        float | None, typer.Option(help="Share of items with two answers; default: the discordance.")
    ] = None,
    power: Annotated[float, typer.Option(help="Chance to conclude what is true.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="Two-sided level of the bounds.")] = 0.05,
    as_json: JsonFlag = False,
) -> None:
    """Units for a shadow or a split to say that the candidate is not worse by the margin, and to say which is better.

    `secateur evaluate` on old rows tells what to expect: its columns "only first right" and "only this right", over the
    rows, add up to the discordance. Experiments look all the time, so the last column is the one that counts.

    \b
    Example:
      secateur samplesize --margin 0.01 --accuracy 0.92 --discordance 0.02
    """
    from service.statistics import power as sizes

    two_answers = discordance if disagreement is None else disagreement
    _check(margin, accuracy, difference, discordance, two_answers, power, alpha)
    candidate = accuracy + difference
    rows = [
        _row(
            "not worse by the margin",
            "shadow",
            sizes.non_inferior_size(margin, discordance, difference, power, alpha),
            sizes.anytime_size(-margin, discordance, difference, power, alpha),
        ),
        _row(
            "not worse by the margin",
            "shadow without labels",
            None,
            sizes.label_free_size(margin, two_answers, power, alpha),
        ),
        _row(
            "not worse by the margin",
            "split, both arms",
            2 * sizes.split_non_inferior_size(accuracy, candidate, margin, power, alpha),
            _twice(sizes.split_anytime_size(-margin, accuracy, candidate, margin, power, alpha)),
        ),
    ]
    if difference:
        better = abs(difference)
        low, high = sorted((accuracy, candidate))
        rows += [
            _row(
                "which one is better",
                "shadow",
                sizes.mcnemar_size(difference, discordance, power, alpha),
                sizes.anytime_size(0.0, discordance, better, power, alpha),
            ),
            _row(
                "which one is better",
                "split, both arms",
                2 * sizes.split_size(accuracy, candidate, power, alpha),
                _twice(sizes.split_anytime_size(0.0, low, high, margin, power, alpha)),
            ),
        ]
    expected = {"accuracy": accuracy, "difference": difference, "discordance": discordance, "disagreement": two_answers}
    if as_json:
        print_json({"margin": margin, "alpha": alpha, "power": power, "expected": expected, "sizes": rows})
        return
    print_table(
        f"units for a chance of {100 * power:g} %, margin {margin:g}, alpha {alpha:g}",
        ("to conclude", "experiment", "at one look", "looking all along"),
        [tuple(_cell(value) for value in row.values()) for row in rows],
    )


def _check(
    margin: float,
    accuracy: float,
    difference: float,
    discordance: float,
    disagreement: float,
    power: float,
    alpha: float,
) -> None:
    """Raise ConfigError for expectations that cannot all be true, or that no sample could ever show."""
    if not 0 < margin < 0.5:
        raise ConfigError(f"--margin is {margin:g}, must be above 0 and below 0.5")
    if not 0 < alpha < 0.5 <= power < 1:
        raise ConfigError(f"--alpha is {alpha:g} and --power {power:g}: they must be in (0, 0.5) and [0.5, 1)")
    if not (0 < accuracy < 1 and 0 < accuracy + difference < 1):
        raise ConfigError(f"--accuracy is {accuracy:g}: it, and it with the difference, must be above 0 and below 1")
    if difference <= -margin:
        raise ConfigError(f"--difference is {difference:g}: a candidate worse by the margin of {margin:g} never passes")
    if not abs(difference) <= discordance <= 1 or not discordance:
        raise ConfigError(f"--discordance is {discordance:g}, must be above 0, at most 1 and at least the difference")
    if not 0 <= disagreement <= 1:
        raise ConfigError(f"--disagreement is {disagreement:g}, must be from 0 to 1")


def _row(question: str, experiment: str, one_look: int | None, anytime: int | None) -> dict[str, Any]:
    return {"to_conclude": question, "experiment": experiment, "one_look": one_look, "anytime": anytime}


def _twice(units: int | None) -> int | None:
    return None if units is None else 2 * units


def _cell(value: str | int | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"

"""The curve of a cascade as a picture: agreement and accuracy against the share that the candidate answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import DataError

if TYPE_CHECKING:
    from service.cascade_calibration import Calibration

# Shown at least, so that a single row does not look like a cliff.
LEAST_POINTS = 2.0


def save(found: "Calibration", path: Path) -> None:
    """Write a PNG. Raises DataError without matplotlib, which serving does not need."""
    save_all({"cascade": found}, path)


def save_all(calibrations: "Mapping[str, Calibration]", path: Path) -> None:
    """A row of two plots for each calibration."""
    try:
        import matplotlib
    except ImportError:
        raise DataError("a plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(calibrations), 2, figsize=(9, 3.2 * len(calibrations)), squeeze=False)
    for (title, found), (left, right) in zip(calibrations.items(), axes, strict=True):
        _agreement(left, title, found)
        _accuracy(right, title, found)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _agreement(axis: Any, title: str, found: "Calibration") -> None:
    share = [100 * point.share for point in found.curve]
    axis.plot(share, [100 * (point.agreement or 0) for point in found.curve], color="tab:green", label="agreement")
    bound = [100 * point.bound for point in found.curve]
    axis.plot(share, bound, color="tab:green", linestyle="--", label="its 95 % lower bound")
    if found.wanted.agreement is not None:
        axis.axhline(100 * found.wanted.agreement, color="black", linewidth=0.8, linestyle=":", label="wanted")
    worst = min(100 * (point.agreement or 0) for point in found.curve)
    axis.set(
        xlabel="answered by the candidate, %",
        ylabel="same label as the control, %",
        title=f"{title}: agreement",
        ylim=(max(worst - 6, 0), 100.5),
    )
    _finish(axis, found)


def _accuracy(axis: Any, title: str, found: "Calibration") -> None:
    axis.axhline(100 * found.control_accuracy, color="black", linewidth=0.8, linestyle=":", label="control alone")
    axis.axhline(100 * found.candidate_accuracy, color="tab:orange", linewidth=0.8, label="candidate alone")
    share = [100 * point.share for point in found.curve]
    axis.plot(share, [100 * point.accuracy for point in found.curve], color="tab:blue", label="cascade")
    low, high = axis.get_ylim()
    room = max(LEAST_POINTS - (high - low), 0) / 2
    axis.set(
        xlabel="answered by the candidate, %",
        ylabel="accuracy, %",
        title=f"{title}: accuracy",
        ylim=(low - room, high + room),
    )
    _finish(axis, found)


def _finish(axis: Any, found: "Calibration") -> None:
    if found.chosen is not None:
        axis.axvline(100 * found.chosen.share, color="tab:red", linewidth=0.8, label=f"at {found.chosen.threshold}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)

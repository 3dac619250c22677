"""Reports as a server would send them, made by hand: numbers of a plausible experiment in each mode."""

import json
import math
from typing import Any

from service.experiments.document import Report

FULL, PRUNED = "sentiment-full", "sentiment-pruned"


def moment(minute: int) -> str:
    return f"2026-01-01T{9 + minute // 60:02}:{minute % 60:02}:00Z"


def quantiles(n: int, median: float, spread: float) -> dict[str, Any]:
    """Log-logistic latencies: the quantile q is median * (q / (1 - q)) ** spread."""
    curve = [median * (q / (100 - q)) ** spread for q in range(1, 100)]
    p50, p95, p99 = curve[49], curve[94], curve[98]
    return {
        "n": n,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "p50_interval": [0.97 * p50, 1.03 * p50],
        "p95_interval": [0.94 * p95, 1.06 * p95],
        "p99_interval": [0.9 * p99, 1.15 * p99],
        "curve": curve,
    }


def looks(
    units: int, estimate: float, width: float, verdict: str = "undecided", steps: int = 120
) -> list[dict[str, Any]]:
    """An estimate that settles down and an interval that narrows with the root of the units, to `width` either way."""
    found = []
    for step in range(1, steps + 1):
        n = max(units * step // steps, 1)
        middle = estimate + 0.4 * width * math.sin(step / 5) * math.sqrt(1 - step / steps)
        half = min(width * math.sqrt(units / n) * (1 + 0.1 * math.log(units / n)), 1.0)
        lower, upper = max(middle - half, -1.0), min(middle + half, 1.0)
        found.append(
            {"units": n, "at": moment(step), "estimate": middle, "lower": lower, "upper": upper, "verdict": verdict}
        )
    return found


def arm(deployment: str, role: str, weight: float | None, units: int, right: int) -> dict[str, Any]:
    share = right / units if units else None
    return {
        "deployment": deployment,
        "role": role,
        "weight": weight,
        "requests": units + units // 4,
        "errors": units // 1000,
        "fallbacks": 0,
        "units": units,
        "labelled": units,
        "right": right,
        "accuracy": share,
        "accuracy_lower": None if share is None else share - 0.008,
        "accuracy_upper": None if share is None else share + 0.008,
        "device_seconds_per_1000": (5.8 if role == "candidate" else 9.1) if units else None,
    }


def class_row(label: str, n: int, control: float, candidate: float, p: float | None) -> dict[str, Any]:
    return {
        "label": label,
        "n": {FULL: n, PRUNED: n},
        "recall": {FULL: control, PRUNED: candidate},
        "lower": {FULL: control - 0.03, PRUNED: candidate - 0.03},
        "upper": {FULL: min(control + 0.03, 1), PRUNED: min(candidate + 0.03, 1)},
        "p_value": p,
    }


def shadow() -> dict[str, Any]:
    """Shadow pairs whose verdict is reached: (75, 75) of 5,000, where the interval is known."""
    return {
        "name": "prune16",
        "revision": 1,
        "task": "sentiment",
        "mode": "shadow",
        "state": "running",
        "traffic": 25.0,
        "winner": None,
        "control": FULL,
        "candidate": PRUNED,
        "metric": "accuracy",
        "margin": 0.01,
        "alpha": 0.05,
        "updated": moment(125),
        "units": 5000,
        "repeats": 312,
        "overrides": 4,
        "dropped": {"events": 0, "busy": 41},
        "arms": [arm(FULL, "control", None, 5000, 4485), arm(PRUNED, "candidate", None, 5000, 4485)],
        "srm": None,
        "labels_srm": None,
        "pairs": {
            "both_right": 4410,
            "only_control": 75,
            "only_candidate": 75,
            "both_wrong": 440,
            "candidate_failed": 0,
        },
        "agreement": 0.968,
        "agreement_interval": [0.9628, 0.9725],
        "mean_abs_dp": 0.0123,
        "max_abs_dp": 0.413,
        "flips": [
            {"control_label": "positive", "candidate_label": "neutral", "n": 61},
            {"control_label": "neutral", "candidate_label": "negative", "n": 48},
            {"control_label": "negative", "candidate_label": "neutral", "n": 33},
        ],
        "difference": {
            "estimate": 0.0,
            "lower": -0.008154,
            "upper": 0.008154,
            "method": "paired_betting",
            "e_non_inferior": 344.76,
            "mcnemar_p": 1.0,
        },
        "classes": [
            class_row("negative", 1610, 0.912, 0.915, 1.0),
            class_row("neutral", 1204, 0.843, 0.838, 0.71),
            class_row("positive", 2186, 0.951, 0.951, None),
        ],
        "latency_ms": {
            "arms": {FULL: quantiles(5000, 9.8, 0.13), PRUNED: quantiles(5000, 6.1, 0.13)},
            "p95_ratio": {"estimate": 0.62, "lower": 0.59, "upper": 0.66},
            "verdict": "contended",
        },
        "memory": {
            "control_bytes": 402_653_184,
            "candidate_bytes": 231_735_296,
            "saved_ratio": 0.424479,
            "basis": "loaded",
            "resident_bytes": 634_388_480,
        },
        "cascade": None,
        "verdict": "non_inferior",
        "words": "sentiment-pruned is not worse than sentiment-full by more than the margin of 1 point.",
        "worse": False,
        "first_decided": {"verdict": "non_inferior", "units": 3120, "at": moment(75)},
        "needed": None,
        "ramp": [5.0, 25.0, 50.0, 100.0],
        "timeline": looks(5000, 0.0, 0.008154, "non_inferior"),
        "steps": [
            {"at": moment(0), "actor": "operator", "action": "configured", "detail": "running, 5 % at 0 units"},
            {"at": moment(30), "actor": "ramp", "action": "traffic", "detail": "25 % at 1010 units"},
            {"at": moment(75), "actor": "report", "action": "decided", "detail": "non_inferior at 3120 units"},
        ],
        "disagreements": [
            {
                "id": f"cls_{7919 * n:032x}",
                "item": n % 3,
                "at": moment(124 - n),
                "control_label": "positive",
                "candidate_label": "neutral",
            }
            for n in range(5)
        ],
        "warnings": [],
    }


def split() -> dict[str, Any]:
    """A split that has not decided yet."""
    return shadow() | {
        "name": "ab-sentiment",
        "mode": "split",
        "traffic": 100.0,
        "units": 5200,
        "arms": [arm(FULL, "control", 50.0, 2630, 2366), arm(PRUNED, "candidate", 50.0, 2570, 2290)],
        "srm": {
            "counts": {FULL: 2630, PRUNED: 2570},
            "chi_square": 0.69,
            "p_value": 0.405,
            "e_value": 0.3,
            "alarm": False,
        },
        "labels_srm": {
            "counts": {FULL: 2630, PRUNED: 2570},
            "chi_square": 0.69,
            "p_value": 0.405,
            "e_value": 0.3,
            "alarm": False,
        },
        "pairs": None,
        "agreement": None,
        "agreement_interval": None,
        "mean_abs_dp": None,
        "max_abs_dp": None,
        "flips": [],
        "disagreements": [],
        "difference": {
            "estimate": -0.0085,
            "lower": -0.0381,
            "upper": 0.0211,
            "method": "two_arm_sequence",
            "e_non_inferior": None,
            "mcnemar_p": None,
        },
        "latency_ms": {
            "arms": {FULL: quantiles(2630, 9.8, 0.13), PRUNED: quantiles(2570, 6.1, 0.13)},
            "p95_ratio": {"estimate": 0.62, "lower": 0.59, "upper": 0.66},
            "verdict": "faster",
        },
        "verdict": "undecided",
        "words": "Nothing is decided: sentiment-pruned may be up to 3.8 points worse or 2.1 points better.",
        "first_decided": None,
        "needed": {"units": 29_500, "more": 24_300, "words": "About 24,300 more units are needed, with their labels."},
        "timeline": looks(5200, -0.0085, 0.0296),
    }


def inferior() -> dict[str, Any]:
    """A split whose candidate is worse than allowed, one class above all."""
    return split() | {
        "name": "too-few-experts",
        "arms": [arm(FULL, "control", 50.0, 2630, 2366), arm(PRUNED, "candidate", 50.0, 2570, 2232)],
        "verdict": "inferior",
        "worse": True,
        "words": f"{PRUNED} is less accurate than {FULL} by at least 1.56 points; 1 are allowed.",
        "needed": None,
        "difference": {
            "estimate": -0.0312,
            "lower": -0.0468,
            "upper": -0.0156,
            "method": "two_arm_sequence",
            "e_non_inferior": None,
            "mcnemar_p": None,
        },
        "timeline": looks(5200, -0.0312, 0.0156, "inferior"),
        "first_decided": {"verdict": "inferior", "units": 3900, "at": moment(90)},
        "classes": [class_row(f"class {n}", 40 + n, 0.9, 0.9 - n / 200, 0.01 if n == 9 else 0.9) for n in range(30)],
        "warnings": ["class_regression: class 9 is found less often"],
    }


def cascade() -> dict[str, Any]:
    """A cascade, whose arms are not compared."""
    return split() | {
        "name": "cascade-4",
        "mode": "cascade",
        "ramp": None,
        "arms": [arm(FULL, "control", None, 0, 0), arm(PRUNED, "candidate", None, 5200, 4690)],
        "srm": None,
        "labels_srm": None,
        "cascade": {"threshold": 0.83, "accepted": 3702, "escalated": 1490, "fallback": 8, "accepted_share": 0.712},
        "verdict": "insufficient_data",
        "words": f"{PRUNED} was sure enough to answer 71.2 % of the items, {FULL} was asked for the rest.",
        "needed": None,
        "difference": None,
        "timeline": [],
    }


def empty(mode: str = "split") -> dict[str, Any]:
    """An experiment that nobody has met."""
    none = {"n": 0, "curve": []} | dict.fromkeys(("p50", "p95", "p99"))
    none |= {f"{name}_interval": [None, None] for name in ("p50", "p95", "p99")}
    is_split = mode == "split"
    return split() | {
        "name": "new",
        "mode": mode,
        "units": 0,
        "repeats": 0,
        "overrides": 0,
        "dropped": {},
        "arms": [
            arm(FULL, "control", 50.0 if is_split else None, 0, 0),
            arm(PRUNED, "candidate", 50.0 if is_split else None, 0, 0),
        ],
        "srm": None,
        "labels_srm": None,
        "difference": None,
        "classes": [],
        "latency_ms": {"arms": {FULL: none, PRUNED: none}, "p95_ratio": None, "verdict": "insufficient_data"},
        "memory": {
            "control_bytes": None,
            "candidate_bytes": None,
            "saved_ratio": None,
            "basis": None,
            "resident_bytes": 0,
        },
        "cascade": {"threshold": 0.9, "accepted": 0, "escalated": 0, "fallback": 0, "accepted_share": None}
        if mode == "cascade"
        else None,
        "verdict": "insufficient_data",
        "words": "No unit has met the experiment yet.",
        "needed": {"units": 200, "more": 200, "words": "At least 100 units in each arm are needed."},
        "ramp": None,
        "timeline": [],
        "steps": [],
    }


def report(document: dict[str, Any], **changes: Any) -> Report:
    """The document with some fields replaced, as the server would have checked it; JSON's lists become tuples."""
    return Report.model_validate_json(json.dumps(document | changes))

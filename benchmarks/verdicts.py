"""How often verdicts are wrong, and how soon they come: simulated experiments that are looked at after every unit.

Everything is seeded. docs/statistics.md shows what this prints; the tests run the same functions on fewer runs.

    python -m benchmarks.verdicts [--runs 2000] [--units 20000] [--json FILE]
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, norm

from service.statistics.latency import quantile_sequence
from service.statistics.means import two_arm_bounds
from service.statistics.paired import log_betting_e_value
from service.statistics.power import anytime_size, non_inferior_size, split_anytime_size, split_non_inferior_size
from service.statistics.srm import ALARM, log_srm_e_value

Floats = npt.NDArray[np.float64]
MARGIN, ALPHA = 0.01, 0.05
FEWEST = 100
# Runs simulated at once: 100 x 20,000 looks of float64 stay in a core's cache and a few dozen megabytes.
BLOCK = 100
NEVER = np.iinfo(np.int64).max


# What may be concluded: (are the arms exchanged, the difference that must be refuted), as bounds past it say.
WORDS = {
    "inferior": (True, MARGIN),
    "worse": (True, 0.0),
    "superior": (False, 0.0),
    "non_inferior": (False, -MARGIN),
}


def first_looks(reached_RN: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The number of the first unit at which a bound was reached, from 1; NEVER where it was not."""
    return np.where(reached_RN.any(axis=1), reached_RN.argmax(axis=1) + 1, NEVER)


def paired_counts(
    runs: int, units: int, difference: float, discordance: float, seed: int
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Blocks of (b, c, n): running counts of pairs that only the control, or only the candidate, gets right."""
    rng = np.random.default_rng(seed)
    only_control, only_candidate = (discordance - difference) / 2, (discordance + difference) / 2
    n_N = np.arange(1.0, units + 1)
    for start in range(0, runs, BLOCK):
        draw_RN = rng.random((min(BLOCK, runs - start), units), dtype=np.float32)
        b_RN = np.cumsum(draw_RN < only_control, axis=1, dtype=np.float64)
        c_RN = np.cumsum(draw_RN >= 1 - only_candidate, axis=1, dtype=np.float64)
        yield b_RN, c_RN, np.broadcast_to(n_N, b_RN.shape)


def first_refuted(
    b_RN: Floats, c_RN: Floats, n_RN: Floats, margin: float, alpha: float, every: int
) -> npt.NDArray[np.int64]:
    """The first unit, not before the 100th, at which the bets refute "the candidate is better by at most `margin`".

    While no count changes, evidence moves steadily one way, so that looking right before and after each change sees
    whatever looking always would. Each `every`-th unit is looked at besides: a first look is late by less than that.
    """
    looks_RN = np.zeros(b_RN.shape, dtype=bool)
    looks_RN[:, :-1] = np.diff(b_RN + 2 * c_RN) != 0
    looks_RN[:, 1:] |= looks_RN[:, :-1]
    looks_RN[:, every - 1 :: every] = True
    looks_RN[:, [FEWEST - 1, -1]] = True
    looks_RN[:, : FEWEST - 1] = False
    reached_RN = np.zeros(b_RN.shape, dtype=bool)
    counts = (b_RN[looks_RN], c_RN[looks_RN], n_RN[looks_RN])
    reached_RN[looks_RN] = log_betting_e_value(*counts, margin) >= log(2 / alpha)
    return first_looks(reached_RN)


def paired_words(
    difference: float, discordance: float, words: Sequence[str], runs: int, units: int, seed: int = 0
) -> dict[str, float]:
    """Share of runs in which each word was ever said. difference: the true one; discordance: only one side is right."""
    found = dict.fromkeys(words, 0.0)
    for b_RN, c_RN, n_RN in paired_counts(runs, units, difference, discordance, seed):
        for word in words:
            exchanged, margin = WORDS[word]
            counts = (c_RN, b_RN, n_RN) if exchanged else (b_RN, c_RN, n_RN)
            found[word] += float((first_refuted(*counts, margin, ALPHA, every=units) < NEVER).sum()) / runs
    return found


def paired_naive(discordance: float, runs: int, units: int, seed: int = 0) -> float:
    """Share of runs without a difference in which a z-test at 5 %, made for one look, finds one at some look."""
    z, found = float(norm.ppf(1 - ALPHA / 2)), 0
    for b_RN, c_RN, _ in paired_counts(runs, units, 0.0, discordance, seed):
        spread_RN = np.sqrt(np.maximum(b_RN + c_RN, 1))
        found += int((np.abs(c_RN - b_RN) > z * spread_RN)[:, FEWEST - 1 :].any(axis=1).sum())
    return found / runs


def paired_stops(difference: float, discordance: float, margin: float, runs: int, units: int, seed: int = 0) -> Floats:
    """Pairs at which each run first says `non_inferior`; infinite where it does not within `units`."""
    blocks = paired_counts(runs, units, difference, discordance, seed)
    first_R = np.concatenate([first_refuted(*counts, -margin, ALPHA, every=10) for counts in blocks])
    return np.where(first_R == NEVER, np.inf, first_R.astype(np.float64))


def split_counts(
    runs: int, units: int, candidate: float, control: float, seed: int
) -> Iterator[tuple[Floats, Floats, Floats, Floats]]:
    """Blocks of (right_1, n_1, right_0, n_0): running counts of units that alternate between the arms."""
    rng = np.random.default_rng(seed)
    is_candidate_N = np.arange(units) % 2 == 0
    n_1_N = np.cumsum(is_candidate_N, dtype=np.float64)
    n_0_N = np.arange(1.0, units + 1) - n_1_N
    for start in range(0, runs, BLOCK):
        draw_RN = rng.random((min(BLOCK, runs - start), units), dtype=np.float32)
        right_1_RN = np.cumsum(is_candidate_N & (draw_RN < candidate), axis=1, dtype=np.float64)
        right_0_RN = np.cumsum(~is_candidate_N & (draw_RN < control), axis=1, dtype=np.float64)
        window = slice(2 * FEWEST - 1, None)
        yield right_1_RN[:, window], n_1_N[window], right_0_RN[:, window], n_0_N[window]


def split_words(
    candidate: float, control: float, runs: int, units: int, floor: float, seed: int = 0
) -> dict[str, float]:
    """Share of runs in which each word was ever said, and `naive`: a pooled z-test found a difference at some look.

    candidate, control: the true accuracies. floor: the margin that sets the least variance of an arm; 0 for none.
    """
    found = dict.fromkeys([*WORDS, "naive"], 0.0)
    z = float(norm.ppf(1 - ALPHA / 2))
    for right_1_RN, n_1_N, right_0_RN, n_0_N in split_counts(runs, units, candidate, control, seed):
        lower_RN, upper_RN = two_arm_bounds(right_1_RN, n_1_N, right_0_RN, n_0_N, floor, ALPHA)
        pooled_RN = (right_1_RN + right_0_RN) / (n_1_N + n_0_N)
        error_RN = np.sqrt(np.maximum(pooled_RN * (1 - pooled_RN), 1e-12) * (1 / n_1_N + 1 / n_0_N))
        said = {
            "inferior": upper_RN < -MARGIN,
            "worse": upper_RN < 0,
            "superior": lower_RN > 0,
            "non_inferior": lower_RN > -MARGIN,
            "naive": np.abs(right_1_RN / n_1_N - right_0_RN / n_0_N) > z * error_RN,
        }
        for word, said_RN in said.items():
            found[word] += float(said_RN.any(axis=1).sum()) / runs
    return found


def split_stops(accuracy: float, margin: float, runs: int, units: int, seed: int = 0) -> Floats:
    """Units per arm at which each run of two equally good arms first says `non_inferior`; else infinite."""
    stops = []
    for right_1_RN, n_1_N, right_0_RN, n_0_N in split_counts(runs, units, accuracy, accuracy, seed):
        lower_RN, _ = two_arm_bounds(right_1_RN, n_1_N, right_0_RN, n_0_N, margin, ALPHA)
        first_R = first_looks(lower_RN > -margin)
        stops.append(np.where(first_R == NEVER, np.inf, FEWEST - 1 + np.minimum(first_R, units) / 2))
    return np.concatenate(stops)


def srm_alarms(share: float, runs: int, units: int, seed: int = 0) -> tuple[float, float, float]:
    """(share of runs with an alarm, its median unit, share in which chi-square's p was ever below .001); halves are
    promised, the first arm gets `share`."""
    rng = np.random.default_rng(seed)
    n_N = np.arange(1.0, units + 1)
    firsts, naive = [], 0
    for start in range(0, runs, BLOCK):
        draw_RN = rng.random((min(BLOCK, runs - start), units), dtype=np.float32)
        first_RN = np.cumsum(draw_RN < share, axis=1, dtype=np.float64)
        count_RNA = np.stack([first_RN, n_N - first_RN], axis=-1)
        firsts.append(first_looks(log_srm_e_value(count_RNA, [0.5, 0.5]) >= log(ALARM)))
        chi_RN = np.square(2 * first_RN - n_N)[:, FEWEST:] / n_N[FEWEST:]
        naive += int((chi_RN > chi2.isf(0.001, 1)).any(axis=1).sum())
    first_R = np.concatenate(firsts)
    raised = first_R[first_R < NEVER]
    return len(raised) / runs, float(np.median(raised)) if len(raised) else float("nan"), naive / runs


def latency_misses(q: float, alpha: float, runs: int, units: int, seed: int = 0) -> float:
    """Share of runs in which bounds of a quantile ever missed the true one; looks are 5 % apart, times log-normal."""
    rng = np.random.default_rng(seed)
    truth = float(np.exp(0.5 * norm.ppf(q)))
    looks = np.unique(np.geomspace(20, units, int(log(units / 20) / 0.05)).astype(int))
    missed = 0
    for _ in range(runs):
        sample_N = rng.lognormal(0, 0.5, units)
        for n in looks:
            lower, upper = quantile_sequence(np.sort(sample_N[:n]), q, alpha)
            if (lower is not None and lower > truth) or (upper is not None and upper < truth):
                missed += 1
                break
    return missed / runs


def clustered_misses(subjects: int, requests: int, runs: int, seed: int = 0) -> tuple[float, float]:
    """Share of runs in which the bounds of a split exclude the true difference, 0, at the end: (all requests counted,
    first of each subject counted). Half of the subjects are nearly always answered rightly, half nearly never."""
    rng = np.random.default_rng(seed)
    misses = np.zeros(2)
    for _ in range(runs):
        ability_S = np.where(rng.random(subjects) < 0.5, 0.98, 0.02)
        right_SQ = rng.random((subjects, requests)) < ability_S[:, None]
        is_candidate_S = rng.random(subjects) < 0.5
        for row, seen_SQ in enumerate((right_SQ, right_SQ[:, :1])):
            one_SQ, zero_SQ = seen_SQ[is_candidate_S], seen_SQ[~is_candidate_S]
            lower, upper = two_arm_bounds(one_SQ.sum(), one_SQ.size, zero_SQ.sum(), zero_SQ.size, MARGIN, ALPHA)
            misses[row] += bool(lower > 0 or upper < 0)
    every, first = (misses / runs).tolist()
    return every, first


Cells = tuple[str, ...]
Table = tuple[str, Cells, list[Cells]]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def whole(units: float | None) -> str:
    return "-" if units is None or not np.isfinite(units) else f"{units:,.0f}"


def errors_of_pairs(runs: int, units: int) -> Table:
    rows: list[Cells] = []
    for discordance in (0.0101, 0.012, 0.02, 0.03, 0.10):
        passed = paired_words(-MARGIN, discordance, ["non_inferior"], runs, units)["non_inferior"]
        rows.append((f"{-MARGIN:g}", percent(discordance), "`non_inferior`", percent(passed), "-"))
    found = paired_words(0.0, 0.03, ["superior", "worse"], runs, units)
    naive = percent(paired_naive(0.03, runs, units))
    rows.append(("0", percent(0.03), "`superior` or worse", percent(sum(found.values())), naive))
    return "Pairs", ("true difference", "discordance", "wrong word", "ever said", "z-test at every look"), rows


def errors_of_splits(runs: int, units: int) -> Table:
    rows: list[Cells] = []
    for candidate, control in ((0.89, 0.9), (0.99, 1.0), (0.9, 0.9), (0.998, 0.998)):
        for floor in (0.0, MARGIN):
            found = split_words(candidate, control, runs, units, floor)
            equal = candidate == control
            wrong = found["superior"] + found["worse"] if equal else found["non_inferior"]
            word = "`superior` or worse" if equal else "`non_inferior`"
            naive = percent(found["naive"]) if equal else "-"
            rows.append((f"{candidate:g}", f"{control:g}", word, "yes" if floor else "no", percent(wrong), naive))
    return "Splits", ("candidate", "control", "wrong word", "floor", "ever said", "z-test at every look"), rows


def stops(runs: int, _: int) -> Table:
    rows: list[Cells] = []
    for discordance in (0.002, 0.01, 0.02, 0.03, 0.05, 0.10):
        planned = anytime_size(-MARGIN, discordance) or 0
        stop_R = paired_stops(0.0, discordance, MARGIN, runs, 2 * planned)
        rows.append(
            _stop_row(f"pairs, {percent(discordance)}", non_inferior_size(MARGIN, discordance), planned, stop_R)
        )
    for accuracy in (0.9, 0.95):
        planned = split_anytime_size(-MARGIN, accuracy, accuracy, MARGIN) or 0
        stop_R = split_stops(accuracy, MARGIN, runs // 4, 4 * planned)
        fixed = split_non_inferior_size(accuracy, accuracy, MARGIN)
        rows.append(_stop_row(f"units per arm, {accuracy:g}", fixed, planned, stop_R))
    return (
        "Stopping",
        ("comparison", "one look", "planned", "half stopped by", "80 % stopped by", "stopped in plan"),
        rows,
    )


def _stop_row(name: str, fixed: int, planned: int, stop_R: Floats) -> Cells:
    half, most = (float(np.quantile(stop_R, share, method="inverted_cdf")) for share in (0.5, 0.8))
    return name, whole(fixed), whole(planned), whole(half), whole(most), percent(float((stop_R <= planned).mean()))


def ratios(runs: int, units: int) -> Table:
    rows: list[Cells] = []
    for share in (0.5, 0.52):
        raised, median, naive = srm_alarms(share, runs, units)
        rows.append((f"{100 * share:g} / {100 - 100 * share:g}", percent(raised), whole(median), percent(naive)))
    return (
        "Sample ratio",
        ("true shares", "alarm ever raised", "half raised by", "chi-square p < .001 at any look"),
        rows,
    )


def others(runs: int, units: int) -> Table:
    every, first = clustered_misses(2000, 10, runs)
    rows: list[Cells] = [
        (f"95 % bounds of the {name} miss it, at any look", percent(latency_misses(q, 0.05, runs // 4, units // 2)))
        for q, name in ((0.5, "median"), (0.95, "95th percentile"))
    ]
    rows += [
        ("2,000 subjects, 10 requests each, no difference: all requests counted", percent(every)),
        ("the same, first request of each subject counted", percent(first)),
    ]
    return "Others", ("what", "wrong"), rows


def markdown(columns: Cells, rows: list[Cells]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ("---",) * len(columns), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--units", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    args = parser.parse_args()
    tables: list[Table] = []
    for table in (errors_of_pairs, errors_of_splits, stops, ratios, others):
        title, columns, rows = table(args.runs, args.units)
        tables.append((title, columns, rows))
        print(f"{title}\n\n{markdown(columns, rows)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(tables, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

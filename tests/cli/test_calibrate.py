"""`secateur calibrate-cascade`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.checkpoint import load_checkpoint, save_checkpoint
from models.dataset import read_rows
from models.evaluate import predict
from service.prediction import softmax
from service.sections import Confidence, ExperimentSettings
from service.statistics.confidence import confidence
from tests.cli.conftest import LABELS, NUM_WORDS

ARMS = [{"deployment": "toy-full", "role": "control"}, {"deployment": "toy-pruned", "role": "candidate"}]


@pytest.fixture(scope="module")
def dev_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 dev rows in 200 groups; rows of other splits have a label that no model knows."""
    draw = random.Random(1)
    texts = [" ".join(f"w{draw.randrange(1, NUM_WORDS)}" for _ in range(draw.randrange(1, 7))) for _ in range(400)]
    rows = [
        {"text": text, "label": LABELS[number % 3], "split": "dev", "group": f"g{number // 2}"}
        for number, text in enumerate(texts)
    ]
    rows += [{"text": "w1", "label": "unheard of", "split": split, "group": ""} for split in ("train", "test")]
    file = tmp_path_factory.mktemp("dev") / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def calibrate(toy: Any, dev_file: Path, run_cli: Callable[..., Any]) -> Callable[..., Any]:
    """calibrate("--agreement", .6, ...) runs the command on the toy and what it was fine-tuned from."""
    return lambda *options: run_cli("calibrate-cascade", toy.finetuned, toy.pretrained, "--data", dev_file, *options)


def as_settings(section: dict[str, Any]) -> ExperimentSettings:
    return ExperimentSettings.model_validate({"task": "toy", "mode": "cascade", "arms": ARMS, **section})


@pytest.mark.parametrize("kind", ["probability", "dispersion"])
def test_the_cascade_is_the_one_a_straightforward_replay_gives(
    kind: str, calibrate: Callable[..., Any], toy: Any, dev_file: Path
) -> None:
    found = calibrate("--cost", 0.4, "--confidence", kind, "--json").document
    settings = as_settings(found["experiment"])
    threshold = found["chosen"]["threshold"]
    assert settings.threshold == threshold
    rows = read_rows(dev_file, "dev")
    full, pruned = load_checkpoint(toy.finetuned), load_checkpoint(toy.pretrained)
    accepted = agreed = right = 0
    for row in rows:
        theirs = predict(full, [row.source])[0].tolist()
        ours = predict(pruned, [row.source])[0].tolist()
        stands = confidence(softmax(ours), full.problem_type, settings.confidence) >= threshold
        label = ours.index(max(ours)) if stands else theirs.index(max(theirs))
        accepted += stands
        agreed += stands and ours.index(max(ours)) == theirs.index(max(theirs))
        right += full.labels[label] == row.label
    if kind == "probability":
        assert found["rows"] == len(rows) == 400
        assert (found["groups"], found["fitted"]) == (200, 0)
        assert found["chosen"]["accepted"] == accepted
        assert 240 <= accepted <= 245  # some short texts are the same
        assert found["chosen"]["agreement"] == pytest.approx(agreed / accepted)
        assert found["chosen"]["accuracy"] == pytest.approx(right / 400)
    else:
        # The rows that fitted the weights are not among those the threshold was chosen on.
        assert (found["rows"], found["fitted"]) == (300, 100)
        assert found["chosen"]["accepted"] >= 180
        assert accepted / 400 == pytest.approx(0.6, abs=0.1)


def test_at_the_ends_one_model_answers_everything(calibrate: Callable[..., Any]) -> None:
    never, always = calibrate("--cost", 0, "--json").document, calibrate("--cost", 1, "--json").document
    assert never["chosen"]["share"] == 1
    assert never["chosen"]["accuracy"] == never["candidate_accuracy"]
    assert always["chosen"]["accepted"] == 0
    assert always["chosen"]["accuracy"] == always["control_accuracy"]
    assert always["chosen"]["work"] == pytest.approx(always["candidate_work"] + 1)


def test_the_kept_threshold_holds_what_was_asked(calibrate: Callable[..., Any]) -> None:
    ran = calibrate("--agreement", 0.8, "--json")
    found = ran.document
    assert ran.code == 0
    assert found["chosen"]["bound"] >= 0.8
    looser = [point for point in found["curve"] if point["threshold"] < found["chosen"]["threshold"]]
    assert not looser or looser[0]["bound"] < 0.8
    assert "no less than" in ran.err
    shares = [point["share"] for point in found["curve"]]
    assert shares == sorted(set(shares))


def test_a_person_sees_the_curve_and_what_to_paste(calibrate: Callable[..., Any]) -> None:
    ran = calibrate("--agreement", 0.8, "--confidence", "dispersion")
    assert "at least" in ran.out
    assert "chosen" in ran.out
    section = yaml.safe_load(ran.out[ran.out.index("mode: cascade") :])
    settings = as_settings(section)
    assert settings.confidence.kind == "dispersion"
    assert not list(settings.problems())
    assert "Memory is not saved" in ran.err


def test_nothing_passes_has_its_own_exit_code_and_says_why(calibrate: Callable[..., Any]) -> None:
    ran = calibrate("--agreement", 0.999, "--json")
    assert ran.code == 3
    assert ran.document["chosen"] is None
    assert ran.document["experiment"] == {}
    assert "2,994 independent rows" in ran.err
    assert "No threshold keeps" in calibrate("--agreement", 0.99).err


def test_identical_models_need_no_escalation(toy: Any, dev_file: Path, run_cli: Callable[..., Any]) -> None:
    found = run_cli("calibrate-cascade", toy.finetuned, toy.finetuned, "--data", dev_file, "--json").document
    assert found["chosen"]["share"] == 1
    assert found["chosen"]["bound"] == pytest.approx(0.05 ** (1 / 400))
    assert found["candidate_work"] == 1
    assert Confidence() == Confidence(**found["confidence"])


def test_files_are_written_and_never_replaced(calibrate: Callable[..., Any], tmp_path: Path) -> None:
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    ran = calibrate("--agreement", 0.8, "--out", out, "--plot", plot, "--json")
    assert json.loads(out.read_text(encoding="utf-8")) == ran.document
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = calibrate("--out", out)
    assert again.code == 2
    assert "exists already" in again.err


def test_what_makes_no_sense_is_refused(
    calibrate: Callable[..., Any], toy: Any, dev_file: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    both = calibrate("--agreement", 0.9, "--cost", 0.5)
    assert both.code == 2
    assert "not both" in both.err
    loaded = load_checkpoint(toy.finetuned)
    renamed = {**loaded.raw_config, "id2label": {"0": "red", "1": "green", "2": "violet"}}
    save_checkpoint(tmp_path / "other", loaded.model, renamed, toy.finetuned / "tokenizer.json")
    other = run_cli("calibrate-cascade", toy.finetuned, tmp_path / "other", "--data", dev_file)
    assert other.code == 2
    assert "other has labels other than finetuned" in other.err
    number = {**loaded.raw_config, "problem_type": "regression"}
    save_checkpoint(tmp_path / "number", loaded.model, number, toy.finetuned / "tokenizer.json")
    regression = run_cli("calibrate-cascade", tmp_path / "number", tmp_path / "number", "--data", dev_file)
    assert regression.code == 2
    assert "is a regression" in regression.err

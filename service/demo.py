"""The demo: three real text tasks, each served full and pruned. Made here from the vendored rows, shipped trained.

`ensure_demo` is what `secateur serve` does without a config: cut the children from the shipped parents, once.
`build_demo` makes everything again, and measures it.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from models.checkpoint import CONFIG_FILE, Checkpoint, load_checkpoint, new_directory
from models.dataset import read_rows
from models.errors import SecateurError
from models.evaluate import Evaluation, agreement, evaluate
from models.families import FAMILIES
from models.hf_config import family_of, read_json
from models.manifest import read_manifest
from models.progress import Progress, silent
from models.pruning import METHODS
from models.pruning.prune import prune
from models.training.config import FINETUNE_DEFAULTS, PRETRAIN_DEFAULTS, RECOVER_DEFAULTS, TrainConfig
from models.training.finetune import finetune, recover
from models.training.pretrain import pretrain
from models.weights import SINGLE_FILE, read_tensors, weight_files

DEMO = Path(__file__).resolve().parent.parent / "demo"
CONFIG = DEMO / "secateur.yaml"
CHECKPOINTS = DEMO / "checkpoints"
METHOD = "router-norm-change"
RANDOM_SEEDS = (0, 1, 2)
# What happens past the shipped cut: a half and a quarter of its experts, but never fewer than each token chooses.
BEYOND = (2, 4)
FEWEST = 2


@dataclass(frozen=True)
class DemoTask:
    """One task: how its parent is fine-tuned, experts its child keeps per layer, how the child is recovered."""

    name: str
    keep: int
    finetuning: TrainConfig
    recovery: TrainConfig

    @property
    def data(self) -> Path:
        return DEMO / "data" / f"{self.name}.jsonl.gz"


PRETRAINING = PRETRAIN_DEFAULTS
# Chosen on dev rows, icd10's token dropout on group folds of train and dev (its dev rows alone favoured .5, which cost
# three points on the folds). trunk_rate .3: at .1 experts hardly matter, and any half of them could go.
SPAM = replace(FINETUNE_DEFAULTS, epochs=3, batch_tokens=3072, max_tokens=192, token_dropout=0.2, trunk_rate=0.3)
ICD10 = replace(FINETUNE_DEFAULTS, epochs=8, token_dropout=0.2, token_split=0.2, trunk_rate=0.3)
LANGUAGE = replace(
    FINETUNE_DEFAULTS, epochs=20, batch_tokens=1024, token_dropout=0.1, token_split=0.4, crop=0.3, trunk_rate=0.3
)
TASKS = (
    DemoTask("spam", 8, SPAM, RECOVER_DEFAULTS),
    DemoTask("icd10", 8, ICD10, RECOVER_DEFAULTS),
    DemoTask("language", 8, LANGUAGE, RECOVER_DEFAULTS),
)


def ensure_demo(progress: Progress = silent, checkpoints: Path = CHECKPOINTS) -> Path:
    """Cut every child that is missing or was cut from another parent, and return the demo's config file.

    Raises SecateurError if the shipped parents are absent.
    """
    for number, task in enumerate(TASKS):
        progress(number, len(TASKS), f"cutting {task.name}/pruned from {task.name}/full")
        full, pruned = checkpoints / task.name / "full", checkpoints / task.name / "pruned"
        parent = read_manifest(full) if full.is_dir() else None
        if parent is None:
            raise SecateurError(f"{full} is missing: run `secateur demo build`, or restore it from the repository")
        child = read_manifest(pruned) if pruned.is_dir() else None
        if child is None or child.parent is None or child.parent.files != parent.files:
            shutil.rmtree(pruned, ignore_errors=True)
            prune(full, METHOD, task.keep, pruned, pretrained=checkpoints / "base")
    progress(len(TASKS), len(TASKS), "demo ready")
    return CONFIG


def build_demo(out: Path, quick: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Pretrain, fine-tune, prune, recover and measure everything below `out`; returns what it writes to results.json.

    `out` gets the layout of the repository's demo folder: checkpoints/base with the routers, checkpoints/TASK/full and
    pruned, plus language-model/ (the whole base) and TASK-recovered. Finished parts are kept and not made again, so an
    interrupted build goes on where it stopped. quick: a small fraction of the rows and steps, to see the chain run.
    """
    recipe = _quick if quick else _whole
    base, checkpoints = out / "language-model", out / "checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    data = [_rows_file(task, out, quick) for task in TASKS]
    if not base.exists():
        pretrain(data, base, recipe(PRETRAINING), size="tiny" if quick else "demo", progress=progress)
    if not (checkpoints / "base").exists():
        save_routers(base, checkpoints / "base")
    results = {}
    for task, file in zip(TASKS, data, strict=True):
        full, pruned, recovered = (
            checkpoints / task.name / "full",
            checkpoints / task.name / "pruned",
            out / f"{task.name}-recovered",
        )
        keep = task.keep // 2 if quick else task.keep
        if not full.exists():
            finetune(base, file, full, recipe(task.finetuning), dtype="bfloat16", progress=progress)
        if not pruned.exists():
            prune(full, METHOD, keep, pruned, pretrained=checkpoints / "base")
        if not recovered.exists():
            recover(pruned, file, recovered, recipe(task.recovery), teacher=full, progress=progress)
        results[task.name] = _measure(task.name, keep, file, full, pruned, recovered, out, progress)
    shutil.copyfile(CONFIG, out / CONFIG.name)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def save_routers(base: Path, out: Path) -> None:
    """Of a base, what router-norm change reads: config.json and the routers, in the base's own precision."""
    raw = read_json(base / CONFIG_FILE)
    template = FAMILIES[family_of(raw).name].parameters["layers.{layer}.w_router_ED"][0]
    names = tuple(template.format(layer=layer) for layer in range(raw["num_hidden_layers"]))
    with new_directory(out) as temporary:
        shutil.copyfile(base / CONFIG_FILE, temporary / CONFIG_FILE)
        routers = read_tensors(weight_files(base), names)
        save_file(routers, temporary / SINGLE_FILE, metadata={"format": "pt"})


def _measure(
    name: str, keep: int, file: Path, full: Path, pruned: Path, recovered: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Parent, child and recovered child on the test rows, and what other methods and deeper cuts would have lost."""
    rows = read_rows(file, "test")

    def judge(checkpoint: Checkpoint) -> Evaluation:
        return evaluate(checkpoint, rows, progress=progress)

    parent = judge(load_checkpoint(full))
    report = {"full": _summary(parent)}
    for label, path in (("pruned", pruned), ("recovered", recovered)):
        report[label] = _summary(judge(load_checkpoint(path)), parent)
    trials = [("slice", METHOD, "slice", 0, keep), ("frequency", "frequency", "zero", 0, keep)]
    trials += [(f"random-{seed}", "random", "zero", seed, keep) for seed in RANDOM_SEEDS]
    trials += [(f"beyond-{share}", METHOD, "zero", 0, max(keep // share, FEWEST)) for share in BEYOND]
    for label, method, semantics, seed, count in trials:
        trial = out / "trials" / name / label
        shutil.rmtree(trial, ignore_errors=True)
        pretrained = out / "checkpoints" / "base" if method == METHOD else None
        rows_file = file if METHODS[method].needs_data else None
        child = prune(full, method, count, trial, pretrained, data=rows_file, semantics=semantics, seed=seed)
        report[label] = _summary(judge(child), parent)
    shutil.rmtree(out / "trials")
    return report


def _summary(result: Evaluation, parent: Evaluation | None = None) -> dict[str, Any]:
    keys = ("rows", "accuracy", "accuracy_interval", "macro_f1", "parameters", "bytes", "dropped_share")
    summary = {key: value for key, value in asdict(result).items() if key in keys}
    if parent is not None:
        summary["against_full"] = asdict(agreement(parent, result))
    return summary


def _whole(config: TrainConfig) -> TrainConfig:
    return config


def _quick(config: TrainConfig) -> TrainConfig:
    return replace(config, epochs=1, min_steps=1)


def _rows_file(task: DemoTask, out: Path, quick: bool, limit: int = 1500) -> Path:
    """The task's data file, or for a quick build its first rows, which are a random sample."""
    if not quick:
        return task.data
    file = out / "data" / f"{task.name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in read_rows(task.data)[:limit])
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file

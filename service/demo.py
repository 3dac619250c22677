"""The demo: three real tasks of texts and one of images, each served full and pruned. Made from vendored rows.

`ensure_demo` is what `secateur serve` does without a config: cut the children from the shipped parents, once.
`build_demo` makes everything again, and measures it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from models.checkpoint import CONFIG_FILE, Checkpoint, load_checkpoint, new_directory
from models.dataset import read_rows
from models.errors import SecateurError
from models.evaluate import Evaluation, agreement, evaluate
from models.families import FAMILIES
from models.hf_config import family_of, parse_config, read_json
from models.manifest import read_manifest
from models.progress import Progress, silent
from models.pruning import METHODS
from models.pruning.prune import prune
from models.training.config import (
    FINETUNE_DEFAULTS,
    IMAGE_FINETUNE_DEFAULTS,
    IMAGE_PRETRAIN_DEFAULTS,
    IMAGE_RECOVER_DEFAULTS,
    PRETRAIN_DEFAULTS,
    RECOVER_DEFAULTS,
    TrainConfig,
)
from models.training.finetune import finetune, recover
from models.training.pretrain import pretrain
from models.training.pretrain_images import pretrain_images
from models.weights import SINGLE_FILE, read_tensors, weight_files

DEMO = Path(__file__).resolve().parent.parent / "demo"
CONFIG = DEMO / "secateur.yaml"
CHECKPOINTS = DEMO / "checkpoints"
METHOD = "router-norm-change"
RANDOM_SEEDS = (0, 1, 2)
# What happens past the shipped cut: a half and a quarter of its experts, but never fewer than each token chooses.
BEYOND = (2, 4)
FEWEST = 2


DATA = DEMO / "data"


@dataclass(frozen=True)
class DemoTask:
    """One task: its rows, how its parent is fine-tuned and from which base, experts per layer of parent and child, how
    the child is recovered."""

    name: str
    file: str
    keep: int
    finetuning: TrainConfig
    recovery: TrainConfig
    base: str = "base"
    experts: int = 16

    @property
    def data(self) -> Path:
        return DATA / self.file


PRETRAINING = PRETRAIN_DEFAULTS
IMAGE_PRETRAINING = IMAGE_PRETRAIN_DEFAULTS
# What the images' base is pretrained on; it is no task of the demo.
IMAGE_CORPUS = DATA / "fashion_mnist_12k.npz"
# Chosen on dev rows, icd10's token dropout on group folds of train and dev (its dev rows alone favoured .5, which cost
# three points on the folds). trunk_rate .3: at .1 experts hardly matter, and any half of them could go.
SPAM = replace(FINETUNE_DEFAULTS, epochs=3, batch_tokens=3072, max_tokens=192, token_dropout=0.2, trunk_rate=0.3)
ICD10 = replace(FINETUNE_DEFAULTS, epochs=8, token_dropout=0.2, token_split=0.2, trunk_rate=0.3)
LANGUAGE = replace(
    FINETUNE_DEFAULTS, epochs=20, batch_tokens=1024, token_dropout=0.1, token_split=0.4, crop=0.3, trunk_rate=0.3
)
DIGITS = replace(IMAGE_FINETUNE_DEFAULTS, epochs=10, learning_rate=2e-3)
TASKS = (
    DemoTask("spam", "spam.jsonl.gz", 8, SPAM, RECOVER_DEFAULTS),
    DemoTask("icd10", "icd10.jsonl.gz", 8, ICD10, RECOVER_DEFAULTS),
    DemoTask("language", "language.jsonl.gz", 8, LANGUAGE, RECOVER_DEFAULTS),
    DemoTask("digits", "mnist_5k.npz", 4, DIGITS, IMAGE_RECOVER_DEFAULTS, base="image-base", experts=8),
)
# A base's routers, which are shipped -> the whole of it, which is not.
BASES = {"base": "language-model", "image-base": "image-model"}


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
            prune(full, METHOD, task.keep, pruned, pretrained=checkpoints / task.base)
    progress(len(TASKS), len(TASKS), "demo ready")
    return CONFIG


def build_demo(out: Path, quick: bool = False, only: Sequence[str] = (), progress: Progress = silent) -> dict[str, Any]:
    """Pretrain, fine-tune, prune, recover and measure everything below `out`; returns what it writes to results.json.

    `out` gets the layout of the repository's demo folder: checkpoints/BASE with the routers, checkpoints/TASK/full and
    pruned, plus language-model/ and image-model/ (the whole bases) and TASK-recovered. Finished parts are kept and not
    made again, so an interrupted build goes on where it stopped. quick: a small fraction of the rows and steps, to see
    the chain run. only: names of tasks, and what they need; default: all. Raises SecateurError for an unknown task.
    """
    unknown = sorted({*only} - {task.name for task in TASKS})
    if unknown:
        raise SecateurError(f"the demo has no task {unknown[0]!r}, it has {', '.join(task.name for task in TASKS)}")
    recipe = _quick if quick else _whole
    checkpoints = out / "checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in TASKS if not only or task.name in only]
    for name in dict.fromkeys(task.base for task in tasks):
        _make_base(name, out, quick, progress)
    results = {}
    for task in tasks:
        base, file = out / BASES[task.base], _rows_file(task.data, out, quick)
        full, pruned, recovered = (
            checkpoints / task.name / "full",
            checkpoints / task.name / "pruned",
            out / f"{task.name}-recovered",
        )
        keep = task.keep // 2 if quick else task.keep
        if not full.exists():
            finetune(base, file, full, recipe(task.finetuning), dtype="bfloat16", progress=progress)
        if not pruned.exists():
            prune(full, METHOD, keep, pruned, pretrained=checkpoints / task.base)
        if not recovered.exists():
            recover(pruned, file, recovered, recipe(task.recovery), teacher=full, progress=progress)
        results[task.name] = _measure(task, keep, file, full, pruned, recovered, out, progress)
    shutil.copyfile(CONFIG, out / CONFIG.name)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _make_base(name: str, out: Path, quick: bool, progress: Progress) -> None:
    """Pretrain a base, and keep its routers as they are shipped."""
    whole, routers = out / BASES[name], out / "checkpoints" / name
    recipe, size = (_quick, "tiny") if quick else (_whole, "demo")
    if not whole.exists() and name == "image-base":
        corpus = _rows_file(IMAGE_CORPUS, out, quick)
        pretrain_images(corpus, whole, recipe(IMAGE_PRETRAINING), size, progress=progress)
    elif not whole.exists():
        corpora = [_rows_file(task.data, out, quick) for task in TASKS if task.base == name]
        pretrain(corpora, whole, recipe(PRETRAINING), size=size, progress=progress)
    if not routers.exists():
        save_routers(whole, routers)


def save_routers(base: Path, out: Path) -> None:
    """Of a base, what router-norm change reads: config.json and the routers, in the base's own precision."""
    raw = read_json(base / CONFIG_FILE)
    template = FAMILIES[family_of(raw).name].parameters["layers.{layer}.w_router_ED"][0]
    layers = parse_config({"id2label": {"0": "unused"}, **raw}).moe_layers
    names = tuple(template.format(layer=layer) for layer in layers)
    with new_directory(out) as temporary:
        shutil.copyfile(base / CONFIG_FILE, temporary / CONFIG_FILE)
        routers = read_tensors(weight_files(base), names)
        save_file(routers, temporary / SINGLE_FILE, metadata={"format": "pt"})


def _measure(
    task: DemoTask, keep: int, file: Path, full: Path, pruned: Path, recovered: Path, out: Path, progress: Progress
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
        trial = out / "trials" / task.name / label
        shutil.rmtree(trial, ignore_errors=True)
        pretrained = out / "checkpoints" / task.base if method == METHOD else None
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


def _rows_file(data: Path, out: Path, quick: bool, limit: int = 1500) -> Path:
    """The data file, or for a quick build its first rows, which are a random sample."""
    if not quick:
        return data
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if data.suffix == ".npz":
        with np.load(data) as arrays:
            np.savez(folder / data.name, **{name: arrays[name][: limit // 3] for name in arrays.files})
        return folder / data.name
    file = folder / data.name.removesuffix(".gz")
    keys = ("text", "label", "split", "group")
    rows = ({key: getattr(row, key) for key in keys} for row in read_rows(data)[:limit])
    file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return file

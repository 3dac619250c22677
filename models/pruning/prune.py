"""Pruning as a sentence: load, calibrate, plan, apply, save."""

import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, source_of
from models.classifier import Classifier, MoELayer
from models.config import ModelConfig, Semantics
from models.dataset import Row, describe, label_ids, read_rows, split_rows, stratified
from models.errors import CheckpointError, PlanError
from models.evaluate import Evaluation, agreement, evaluate
from models.manifest import Accuracy, ClassAccuracy, Layer, Rows
from models.progress import Progress, silent
from models.pruning import METHODS, Job, LayerPlan, Method
from models.pruning.allocate import Budget, Keep, Rules, allocate
from models.pruning.apply import apply
from models.pruning.calibrate import SAMPLE_TOKENS, calibrate
from models.pruning.guards import (
    forecast,
    refuse_class_loss,
    refuse_compressed,
    refuse_lost,
    super_experts,
    together,
    warn_of_thin_data,
)
from models.pruning.routers import router_pairs
from models.pruning.stats import DATA_GROUPS, FROM_DATA, SOURCES, Core, LayerStats, RouterPair, Sample, Weights
from models.pruning.store import Meta, Stored, load, refuse_other, save
from models.tokenizer import TOKENIZER_FILE
from models.weights import DTYPES

CALIBRATION_ROWS = 256
log = logging.getLogger("secateur.pruning")


@dataclass(frozen=True)
class TaskRows:
    """Rows that calibrate, as the model's items and with their classes, and rows that judge parent and child."""

    calibration: Rows
    sequences: tuple[Sized, ...]
    labels: tuple[int, ...]
    name: str
    dev: tuple[Row, ...]


def prune(
    finetuned: Path,
    method: str,
    keep: Keep,
    out: Path,
    pretrained: Path | None = None,
    data: Path | None = None,
    semantics: str | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    rules: Rules | None = None,
    stats: Path | None = None,
    max_class_loss: float | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Cut a fine-tuned checkpoint's experts and write the verified child to `out`.

    keep: experts per layer as a count, a fraction of each layer's experts (rounded to the nearest count), a count for
    each layer, or a budget in bytes. pretrained: the checkpoint, or a directory with config.json and the routers, that
    fine-tuning started from. data: task rows; train rows calibrate methods that need it, dev rows (a tenth of a file
    without splits) judge parent and child for the manifest. semantics: one of the method's, or None for its own choice.
    options: the method's, as texts. stats: a file of statistics to reuse, or to write if it does not exist.
    max_class_loss: refuse a child in which a class loses more than this fraction of its recall on the dev rows.
    Raises PlanError, DataError or CheckpointError; then no checkpoint is written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")
    chosen = _choose_method(method)
    meaning = _choose_semantics(chosen, semantics)
    settings = chosen.read_options(options or {})
    needed = chosen.needed(settings)
    rules = rules or Rules()
    counts_given = isinstance(keep, tuple)
    rules = replace(rules, allocation=rules.allocation or ("uniform" if counts_given else chosen.allocation))
    _check_inputs(chosen, needed, pretrained, data, stats, max_class_loss)

    parent = load_checkpoint(finetuned, dtype="auto")
    config = parent.model.config
    refuse_compressed(config)
    meaning = _fitting(config, chosen, meaning, semantics)
    rules.check(config)
    if RouterPair in needed:
        _warn_of_adam(parent, chosen)
    rows = task_rows(parent, data.name, read_rows(data), seed) if data is not None else None
    known, calibration = gather(parent, needed, pretrained, rows, stats, seed, progress)
    job, plans = choose(parent, chosen, meaning, settings, keep, rules, known, rows, seed, progress)
    warn_of_thin_data(known, plans)
    child = apply(parent.model, plans, rules.allow_lower_k)
    accuracy = _judge(parent, child, rows, max_class_loss, progress) if rows and rows.dev else None
    return save_checkpoint(
        out,
        child,
        parent.raw_config,
        parent.path / TOKENIZER_FILE,
        layers=_manifest_layers(parent, child, plans, known),
        dtype=parent.stored_dtype,
        method=method,
        options={**_recorded(keep, seed, rules, job), **chosen.recorded(settings)},
        semantics=meaning,
        parent=parent.source(),
        pretrained=source_of(pretrained) if pretrained and RouterPair in needed else None,
        calibration=calibration,
        accuracy=accuracy,
        training=parent.manifest.training if parent.manifest else None,
    )


def choose(
    parent: Checkpoint,
    method: Method,
    semantics: Semantics,
    settings: Mapping[str, Any],
    keep: Keep,
    rules: Rules,
    known: Mapping[int, LayerStats],
    rows: TaskRows | None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Job, dict[int, LayerPlan]]:
    """What each layer keeps, and how, under all guards that read statistics. Raises PlanError."""
    protect = together(rules.protect, super_experts(known, parent.model.config.num_layers) if rules.keep_super else {})
    score = None if method.score is None else partial(_score, method, known, settings)
    size = DTYPES[parent.stored_dtype].itemsize
    job = Job(
        parent=parent.model,
        stats=known,
        keep=allocate(parent.model.config, keep, semantics, rules, size, score, protect),
        semantics=semantics,
        options=settings,
        sequences=rows.sequences if rows else (),
        labels=rows.labels if rows else (),
        seed=seed,
        progress=progress,
        protect={layer: experts for layer, experts in protect.items() if layer not in rules.exempt},
        exempt=rules.exempt,
        parent_sha256=parent.artifact_sha256,
    )
    plans = method.plan(job)
    refuse_lost(plans, job.protect, method.name)
    return job, plans


def _choose_method(name: str) -> Method:
    if name not in METHODS:
        raise PlanError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
    return METHODS[name]


def _choose_semantics(method: Method, requested: str | None) -> Semantics:
    for semantics in method.semantics:
        if requested in (None, semantics):
            return semantics
    raise PlanError(f"semantics is {requested!r}, {method.name} can do {', '.join(method.semantics)}")


def _fitting(config: ModelConfig, method: Method, meaning: Semantics, requested: str | None) -> Semantics:
    """Where experts choose their tokens, every router row must stay (models.pruning.apply says why)."""
    if config.vision is None or not config.vision.capacity or meaning != "slice":
        return meaning
    others = [semantics for semantics in method.semantics if semantics != "slice"]
    if requested is not None or not others:
        can = f", {method.name} can do {', '.join(others)}" if others else f", which is all {method.name} can do"
        raise PlanError(f"experts choose their tokens here, and slice would change every gate{can}")
    return others[0]


def _check_inputs(
    method: Method,
    needed: set[type],
    pretrained: Path | None,
    data: Path | None,
    stats: Path | None,
    max_class_loss: float | None,
) -> None:
    """What can be refused before anything is loaded."""
    if RouterPair in needed and pretrained is None:
        raise PlanError(f"{method.name}: {SOURCES[RouterPair]}")
    if needed & set(DATA_GROUPS) and data is None and stats is None:
        raise PlanError(f"{method.name}: {FROM_DATA}")
    if max_class_loss is not None:
        if data is None:
            raise PlanError("--max-class-loss compares parent and child on dev rows: give --data FILE")
        if not 0.0 <= max_class_loss <= 1.0:
            raise PlanError(f"--max-class-loss is {max_class_loss}, must be from 0 to 1 (0.02 is two points)")


def task_rows(parent: Checkpoint, name: str, rows: Sequence[Row], seed: int = 0) -> TaskRows:
    """Of a file's rows, those that calibrate and those that judge; test rows are neither."""
    train_rows, dev_rows = split_rows(rows, seed)
    chosen = stratified(train_rows, CALIBRATION_ROWS)
    labels = label_ids(chosen, parent.labels)
    pairs = [(parent.encoder.encode(row.source).ids, label) for row, label in zip(chosen, labels, strict=True)]
    pairs = [(ids, label) for ids, label in pairs if len(ids)]
    return TaskRows(
        calibration=describe(name, chosen),
        sequences=tuple(ids for ids, _ in pairs),
        labels=tuple(label for _, label in pairs),
        name=name,
        dev=tuple(dev_rows),
    )


def gather(
    parent: Checkpoint,
    needed: set[type],
    pretrained: Path | None,
    rows: TaskRows | None,
    file: Path | None,
    seed: int,
    progress: Progress,
) -> tuple[dict[int, LayerStats], Rows | None]:
    """Everything that the method asks for, by layer, and the rows it was counted on."""
    config = parent.model.config
    known = {
        index: LayerStats(index, config.layers[index].num_rows, config.top_k, seed, config.normalize_top_k)
        for index in config.moe_layers
    }
    if RouterPair in needed and pretrained is not None:
        pairs = router_pairs(parent.path, pretrained, config.moe_layers)
        known = {index: stats.having(pairs[index]) for index, stats in known.items()}
    if Weights in needed:
        known = {index: stats.having(_weights(parent.model, index)) for index, stats in known.items()}
    counted = needed & set(DATA_GROUPS)
    if not counted:
        return known, None
    # The guards read Core, which costs next to nothing.
    stored = _stored_or_counted(parent, {Core, *counted}, rows, file, seed, progress)
    known = {index: stats.having(*stored.layers[index].groups) for index, stats in known.items()}
    return known, stored.meta.rows


def _stored_or_counted(
    parent: Checkpoint,
    wanted: set[type],
    rows: TaskRows | None,
    file: Path | None,
    seed: int,
    progress: Progress,
) -> Stored:
    """The statistics of the file, and from the rows what it lacks, which is written back."""
    config = parent.model.config
    stored = load(file) if file is not None and (file.exists() or rows is None) else None
    policies = [layer.policy for layer in parent.model.layers if isinstance(layer, MoELayer)]
    meta = Meta(
        parent_sha256=parent.artifact_sha256,
        data=(rows.calibration,) if rows is not None else stored.meta.data if stored is not None else (),
        kind=policies[0].score,
        top_k=config.top_k,
        normalize=config.normalize_top_k,
        dtype=str(parent.model.dtype).removeprefix("torch."),
        seed=seed,
        sample=SAMPLE_TOKENS,
    )
    if stored is not None:
        assert file is not None
        refuse_other(file, stored.meta, meta, sampled=Sample in wanted)
    missing = sorted(wanted - (stored.groups() if stored else set()), key=lambda group: DATA_GROUPS.index(group))
    if stored is not None and not missing:
        return stored
    if rows is None:
        assert file is not None
        raise PlanError(f"{file.name} lacks the statistics {missing[0].__name__}: give --data FILE to add them")
    counted = calibrate(parent.model, rows.sequences, missing, rows.labels, seed, progress=progress)
    layers = {
        index: (
            stored.layers[index] if stored else LayerStats(index, config.layers[index].num_rows, config.top_k)
        ).having(*groups)
        for index, groups in counted.items()
    }
    result = Stored(meta, layers)
    if file is not None:
        save(file, result)
    return result


def _weights(model: Classifier, index: int) -> Weights:
    layer = model.layers[index]
    assert isinstance(layer, MoELayer)
    router_ED, w_in_EGD, w_out_EDF = (
        tensor.detach().float().cpu().numpy() for tensor in (layer.w_router_ED, layer.w_in_PGD, layer.w_out_PDF)
    )
    return Weights(router_ED, w_in_EGD, w_out_EDF, layer.experts.gated)


def _score(method: Method, stats: Mapping[int, LayerStats], settings: Mapping[str, Any], layer: int) -> Any:
    assert method.score is not None
    return method.score(stats[layer], **settings)


def _judge(
    parent: Checkpoint, child: Classifier, rows: TaskRows, max_class_loss: float | None, progress: Progress
) -> Accuracy:
    """Parent and child on the same rows; the child as it will be stored, since pruning selects or mixes weights."""
    after = evaluate(replace(parent, model=child), rows.dev, progress=progress)
    before = evaluate(parent, rows.dev, progress=progress)
    if max_class_loss is not None:
        refuse_class_loss(before, after, max_class_loss)
    return Accuracy(
        data=describe(rows.name, rows.dev),
        child=after.accuracy,
        parent=before.accuracy,
        agreement=agreement(before, after).rate,
        classes=_by_class(before, after),
    )


def _by_class(before: Evaluation, after: Evaluation) -> tuple[ClassAccuracy, ...]:
    pairs = zip(before.recalls, after.recalls, strict=True)
    return tuple(ClassAccuracy(label=b.label, rows=b.rows, parent=b.recall, child=a.recall) for b, a in pairs)


def _warn_of_adam(parent: Checkpoint, method: Method) -> None:
    """Adam divides the size of gradients away, and with it the signal of router-norm change (arXiv 2405.16646)."""
    training = (parent.manifest.training if parent.manifest else None) or {}
    if training.get("router_optimizer") == "adamw":
        log.warning(
            "%s: routers were fine-tuned by AdamW, so %s may rank experts no better than chance; compare frequency",
            parent.path.name,
            method.name,
        )


def _recorded(keep: Keep, seed: int, rules: Rules, job: Job) -> dict[str, Any]:
    """The request as the manifest keeps it: whatever differs from doing nothing special."""
    record: dict[str, Any] = {"keep": {"bytes": keep.bytes} if isinstance(keep, Budget) else keep, "seed": seed}
    if rules.allocation != "uniform":
        record["allocation"] = rules.allocation
    if rules.exempt:
        record["exempt"] = list(rules.exempt)
    if job.protect:
        record["protected"] = {str(layer): list(experts) for layer, experts in job.protect.items()}
    if not rules.keep_super:
        record["keep_super"] = False
    if rules.allow_lower_k:
        record["allow_lower_k"] = True
    return record


def _manifest_layers(
    parent: Checkpoint,
    child: Classifier,
    plans: Mapping[int, LayerPlan],
    stats: Mapping[int, LayerStats],
) -> tuple[Layer, ...]:
    layers = []
    vision = child.config.vision
    experts_choose = vision is not None and vision.capacity > 0  # then any number of experts may take a token
    for index, shape in enumerate(child.config.layers):
        total = parent.experts_total[index]
        if index not in plans:
            layers.append(Layer(total=total, num_experts=shape.num_experts, kept=(), route=shape.route_E))
            continue
        plan, expected = plans[index], forecast(stats[index], plans[index])
        layers.append(
            Layer(
                total=total,
                num_experts=shape.num_experts,
                kept=plan.kept,
                route=shape.route_E,
                compression=shape.compression,
                scores=() if plan.score_E is None else tuple(np.asarray(plan.score_E, dtype=float).tolist()),
                kept_slots=expected.kept_slots if expected else None,
                lost_tokens=expected.lost_tokens if expected and not experts_choose else None,
            )
        )
    return tuple(layers)

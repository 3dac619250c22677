"""Pruning as a sentence: load, calibrate, plan, apply, save."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, source_of
from models.config import SEMANTICS, Semantics
from models.dataset import Row, describe, read_rows, split_rows, stratified
from models.decoder import MoEClassifier
from models.errors import CheckpointError, PlanError
from models.evaluate import evaluate
from models.families import FAMILIES
from models.hf_config import family_of, read_json
from models.manifest import Accuracy, Layer
from models.progress import Progress, silent
from models.pruning import METHODS, LayerPlan, Method
from models.pruning.apply import apply
from models.pruning.calibrate import calibrate
from models.pruning.stats import LayerStats, RouterPair
from models.tokenizer import TOKENIZER_FILE
from models.weights import read_tensors, tensor_headers, weight_files

CALIBRATION_ROWS = 256
log = logging.getLogger("secateur.pruning")


def prune(
    finetuned: Path,
    method: str,
    keep: float | int,
    out: Path,
    pretrained: Path | None = None,
    data: Path | None = None,
    semantics: str | None = None,
    seed: int = 0,
    allow_flat: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Cut a fine-tuned checkpoint's experts and write the verified child to `out`.

    keep: experts per layer as a count, or a fraction of each layer's experts (a float, rounded to the nearest count).
    pretrained: the checkpoint, or a directory with config.json and the routers, that fine-tuning started from. data:
    task rows; train rows calibrate methods that need it, dev rows (a tenth of a file without splits) judge parent and
    child for the manifest. semantics: slice, zero, or None for the method's own. Raises PlanError, DataError or
    CheckpointError; then nothing is written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")
    chosen = _choose_method(method, pretrained, data)
    meaning = _choose_semantics(chosen, semantics)
    options = {"allow_flat": allow_flat} if "allow_flat" in chosen.options else {}

    parent = load_checkpoint(finetuned, dtype="auto")
    _warn_of_adam(parent, chosen)
    train_rows, dev_rows = split_rows(read_rows(data), seed) if data is not None else ((), ())
    stats = _layer_stats(parent, pretrained, seed)
    calibration = None
    if data is not None and chosen.needs_data:
        calibration_rows = stratified(train_rows, CALIBRATION_ROWS)
        calibration = describe(data.name, calibration_rows)
        stats = _with_counts(parent, stats, calibration_rows, progress)
    plans = {
        index: chosen.plan(layer, count_to_keep(keep, layer, meaning), meaning, **options)
        for index, layer in stats.items()
    }
    child = apply(parent.model, plans)
    return save_checkpoint(
        out,
        child,
        parent.raw_config,
        parent.path / TOKENIZER_FILE,
        layers=_manifest_layers(parent, child, plans),
        dtype=parent.stored_dtype,
        method=method,
        options={"keep": keep, "seed": seed, **options},
        semantics=meaning,
        parent=parent.source(),
        pretrained=source_of(pretrained) if pretrained and chosen.needs_pretrained else None,
        calibration=calibration,
        accuracy=_judge(parent, child, data.name, dev_rows, progress) if data is not None and dev_rows else None,
        training=parent.manifest.training if parent.manifest else None,
    )


def count_to_keep(keep: float | int, stats: LayerStats, semantics: Semantics) -> int:
    """Experts to keep in one layer. Raises PlanError for a count no token could be routed with.

    At least top-k experts stay: under `slice` the router must fill its choices, under `zero` a token would too often
    lose all of them.
    """
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise PlanError(f"keep is {keep}, must be a fraction above 0 and up to 1, or a count")
        keep = round(keep * stats.num_experts)
    if keep > stats.num_experts:
        raise PlanError(f"keep is {keep}, but layer {stats.layer} has only {stats.num_experts} experts")
    if keep < stats.top_k:
        raise PlanError(f"keep is {keep}, fewer than the top-{stats.top_k} experts each token chooses")
    return keep


def _choose_method(name: str, pretrained: Path | None, data: Path | None) -> Method:
    if name not in METHODS:
        raise PlanError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
    method = METHODS[name]
    if method.needs_pretrained and pretrained is None:
        raise PlanError(f"{name} compares routers before and after fine-tuning: give --pretrained DIR")
    if method.needs_data and data is None:
        raise PlanError(f"{name} needs task data to calibrate on: give --data FILE")
    return method


def _choose_semantics(method: Method, requested: str | None) -> Semantics:
    chosen = requested or method.default_semantics
    for semantics in ("slice", "zero"):
        if chosen == semantics:
            return semantics
    if chosen in SEMANTICS:
        raise PlanError(f"semantics is {chosen!r}, but {method.name} drops experts: use slice or zero")
    raise PlanError(f"semantics is {chosen!r}, must be slice or zero")


def _layer_stats(parent: Checkpoint, pretrained: Path | None, seed: int) -> dict[int, LayerStats]:
    config = parent.model.config
    routers = router_pairs(parent.path, pretrained, config.moe_layers) if pretrained is not None else {}
    return {
        index: LayerStats(
            layer=index,
            num_experts=config.layers[index].num_rows,
            top_k=config.top_k,
            seed=seed,
            routers=routers.get(index),
        )
        for index in config.moe_layers
    }


def _with_counts(
    parent: Checkpoint, stats: dict[int, LayerStats], rows: Sequence[Row], progress: Progress
) -> dict[int, LayerStats]:
    sequences = [parent.encoder.encode(row.text).ids for row in rows]
    counts = calibrate(parent.model, [ids for ids in sequences if ids], progress=progress)
    return {i: layer.with_counts(counts[i]) for i, layer in stats.items()}


def _judge(parent: Checkpoint, child: MoEClassifier, name: str, rows: Sequence[Row], progress: Progress) -> Accuracy:
    """Parent and child on the same rows; the child as it will be stored, since pruning selects or mixes weights."""
    after = evaluate(replace(parent, model=child), rows, progress=progress)
    before = evaluate(parent, rows, progress=progress)
    return Accuracy(data=describe(name, rows), child=after.accuracy, parent=before.accuracy)


def _warn_of_adam(parent: Checkpoint, method: Method) -> None:
    """Adam divides the size of gradients away, and with it the signal of router-norm change (arXiv 2405.16646)."""
    training = (parent.manifest.training if parent.manifest else None) or {}
    if method.needs_pretrained and training.get("router_optimizer") == "adamw":
        log.warning(
            "%s: routers were fine-tuned by AdamW, so %s may rank experts no better than chance; compare frequency",
            parent.path.name,
            method.name,
        )


def router_pairs(finetuned: Path, pretrained: Path, layers: tuple[int, ...]) -> dict[int, RouterPair]:
    """Both routers of each layer, read from the files themselves.

    Raises PlanError if families, expert counts or widths differ, or the experts of either were re-ordered or cut.
    """
    raws = [read_json(path / "config.json") for path in (pretrained, finetuned)]
    before, after = (family_of(raw).name for raw in raws)
    if before != after:
        raise PlanError(f"the pretrained checkpoint is a {before}, the fine-tuned one a {after}: not the same model")
    template = FAMILIES[after].parameters["layers.{layer}.w_router_ED"][0]
    names = tuple(template.format(layer=layer) for layer in layers)
    files = [weight_files(path) for path in (pretrained, finetuned)]
    old, new = (read_tensors(file, names) for file in files)
    stored = {header[2] for file in files for name, header in tensor_headers(file).items() if name in names}
    pairs = {}
    for layer, name in zip(layers, names, strict=True):
        if old[name].shape != new[name].shape:
            raise PlanError(
                f"{name} is {list(old[name].shape)} before and {list(new[name].shape)} after fine-tuning: "
                "the experts were cut or re-ordered in between, so rows do not correspond"
            )
        pairs[layer] = RouterPair(
            pretrained_ED=old[name].double().numpy(),
            finetuned_ED=new[name].double().numpy(),
            stored_in_16_bit=bool(stored - {"F32"}),
        )
    return pairs


def _manifest_layers(parent: Checkpoint, child: MoEClassifier, plans: Mapping[int, LayerPlan]) -> tuple[Layer, ...]:
    layers = []
    for index, shape in enumerate(child.config.layers):
        total = parent.experts_total[index]
        if index not in plans:
            layers.append(Layer(total=total, num_experts=shape.num_experts, kept=(), route=shape.route_E))
            continue
        scores: tuple[Any, ...] = (
            () if plans[index].score_E is None else tuple(np.asarray(plans[index].score_E).tolist())
        )
        layers.append(
            Layer(
                total=total,
                num_experts=shape.num_experts,
                kept=plans[index].kept,
                route=shape.route_E,
                scores=scores,
            )
        )
    return tuple(layers)

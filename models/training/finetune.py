"""Classification fine-tuning, and recovery after pruning: the same objective from two starting points.

Legend: B texts, C classes, D model width, E experts.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, source_of
from models.config import Pooling
from models.dataset import Row, describe, label_ids, read_rows, split_rows
from models.decoder import DecoderLayer, MoEClassifier, pool
from models.errors import CheckpointError, DataError
from models.evaluate import evaluate
from models.manifest import Accuracy
from models.packed import PackedBatch
from models.progress import Progress, silent
from models.tokenizer import TOKENIZER_FILE, TextEncoder
from models.training.augment import Ids, TokenSplitter, crop, drop_tokens, window
from models.training.config import TrainConfig
from models.training.initial import fresh_head
from models.training.loop import Step, train, training_device
from models.training.losses import RouterTap, balance_loss, distillation_loss
from models.training.noise import Dropout


class Classification:
    """Cross-entropy on noised texts, plus a teacher's probabilities on the same tokens if there is one."""

    def __init__(
        self,
        model: MoEClassifier,
        texts: Sequence[Ids],
        labels: Sequence[int],
        splitter: TokenSplitter,
        config: TrainConfig,
        teacher: MoEClassifier | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.label_N = torch.tensor(labels)
        self.splitter = splitter
        self.config = config
        self.teacher = teacher

    def epoch(self, generator: np.random.Generator) -> list[tuple[int, Ids]]:
        return [(row, self.noised(ids, generator)) for row, ids in enumerate(self.texts)]

    def noised(self, ids: Ids, generator: np.random.Generator) -> Ids:
        """A part of the text, some tokens split (a random share per text), some dropped, cut to the length."""
        c = self.config
        if generator.random() < c.crop:
            ids = crop(ids, generator)
        ids = self.splitter(ids, c.token_split * 2 * generator.random(), generator)
        return window(drop_tokens(ids, c.token_dropout, generator), c.max_tokens, generator)

    def loss(self, step: Step) -> torch.Tensor:
        c = self.config
        batch, tap = PackedBatch.pack(step.sequences, self.model.device), RouterTap()
        x_TD = self.model.hidden(batch, tap, noise=Dropout(batch, c.dropout, c.path_dropout))
        x_BD = F.dropout(pool(x_TD, batch, self.model.config.pooling), c.head_dropout)
        logits_BC = F.linear(x_BD, self.model.score_CD)
        label_B = self.label_N[list(step.rows)].to(self.model.device)
        loss = F.cross_entropy(logits_BC, label_B, label_smoothing=c.label_smoothing)
        if c.balance_loss:
            loss = loss + c.balance_loss * balance_loss(tap)
        if self.teacher is not None:
            with torch.no_grad():
                teacher_BC = self.teacher.classify(step.sequences).logits_BC.clone().to(self.model.device)
            loss = loss + c.distill * distillation_loss(logits_BC, teacher_BC)
        return loss


def finetune(
    base: Path,
    data: Path,
    out: Path,
    config: TrainConfig,
    pooling: Pooling = "mean",
    teacher: Path | None = None,
    dtype: str = "float32",
    progress: Progress = silent,
) -> Checkpoint:
    """Train a classifier on the train rows of `data` from a pretrained base, and write it to `out`.

    Classes are the labels of the rows, sorted. The manifest records accuracy on the dev rows (a tenth held out where
    the file has no splits), how routers were trained, and how far each moved. Saved steps lie in `<out>.training`.
    """
    _refuse_existing(out)
    rows = read_rows(data)
    train_rows, dev_rows = split_rows(rows, config.seed)
    labels = tuple(sorted({row.label for row in train_rows}))
    if len(labels) < 2:
        raise DataError(f"{data.name}: train rows have {len(labels)} class, a classifier needs at least 2")
    label_ids(dev_rows, labels)  # refuse a label that training never shows before training, not after
    model, raw = fresh_head(base, labels, pooling, config.max_tokens, config.seed)
    before = router_weights(model)
    file = base / TOKENIZER_FILE
    record = _fit(model, file, train_rows, labels, config, teacher, out, f"fine-tuning on {data.name}", progress)
    record["router_movement"] = router_movement(before, model)
    return _save_judged(
        out, model, raw, file, dev_rows or train_rows, data.name, dtype, pretrained=source_of(base), training=record
    )


def recover(
    checkpoint: Path,
    data: Path,
    out: Path,
    config: TrainConfig,
    teacher: Path | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Train a pruned checkpoint a little on its task, experts and routes as they are, and write it to `out`.

    Texts are cut at the length of the checkpoint if config.max_tokens is greater. teacher: usually the unpruned parent.
    The manifest keeps the record of the pruning and adds that of the recovery.
    """
    _refuse_existing(out)
    start = load_checkpoint(checkpoint, dtype="float32")
    if start.problem_type != "single_label_classification":
        raise CheckpointError(
            f"{checkpoint.name}: problem_type is {start.problem_type}, recovery needs single-label rows"
        )
    train_rows, dev_rows = split_rows(read_rows(data), config.seed)
    config = replace(config, max_tokens=min(config.max_tokens, start.encoder.max_tokens))
    model = start.model.requires_grad_(True)
    before = router_weights(model)
    file = start.path / TOKENIZER_FILE
    record = _fit(model, file, train_rows, start.labels, config, teacher, out, f"recovering on {data.name}", progress)
    record["router_movement"] = router_movement(before, model)
    kept = start.manifest
    carried = {} if kept is None else {name: getattr(kept, name) for name in CARRIED}
    earlier = kept.training if kept is not None else None
    return _save_judged(
        out,
        model,
        dict(start.raw_config),
        file,
        dev_rows or train_rows,
        data.name,
        start.stored_dtype,
        training={"finetuning": earlier, "recovery": record},
        **carried,
    )


CARRIED = ("method", "options", "semantics", "layers", "parent", "pretrained", "calibration")


def router_weights(model: MoEClassifier) -> dict[int, torch.Tensor]:
    """A copy of each MoE layer's router: layer -> [E, D]."""
    layers = {i: model.layers[i] for i in model.config.moe_layers}
    return {i: layer.w_router_ED.detach().clone() for i, layer in layers.items() if isinstance(layer, DecoderLayer)}


def router_movement(before: dict[int, torch.Tensor], model: MoEClassifier) -> list[float]:
    """Per MoE layer, the norm of the router's change over the norm it had."""
    after = router_weights(model)
    return [round(float((after[i] - before[i]).norm() / before[i].norm()), 4) for i in before]


def _fit(
    model: MoEClassifier,
    tokenizer_file: Path,
    rows: Sequence[Row],
    labels: tuple[str, ...],
    config: TrainConfig,
    teacher: Path | None,
    out: Path,
    message: str,
    progress: Progress,
) -> dict[str, object]:
    # A text keeps three times the length, so that random windows have something to choose from.
    encoder = TextEncoder(tokenizer_file, 3 * config.max_tokens, model.config.vocab_size)
    pairs = [
        (ids, label)
        for row, label in zip(rows, label_ids(rows, labels), strict=True)
        if (ids := encoder.encode(row.text).ids)
    ]
    device = training_device()
    model.to(device)
    master = None
    if teacher is not None:
        master = load_checkpoint(teacher, device).model
        if master.config.num_labels != len(labels):
            raise CheckpointError(
                f"--teacher {teacher.name} has {master.config.num_labels} classes, the data {len(labels)}"
            )
    objective = Classification(
        model, [ids for ids, _ in pairs], [label for _, label in pairs], TokenSplitter(tokenizer_file), config, master
    )
    record = train(model, objective, config, _state_directory(out), message, progress)
    model.to("cpu")
    return record


def _save_judged(
    out: Path,
    model: MoEClassifier,
    raw: dict[str, object],
    tokenizer_file: Path,
    rows: Sequence[Row],
    name: str,
    dtype: str,
    **provenance: Any,
) -> Checkpoint:
    """Save, evaluate what was saved, and put the accuracy into the manifest."""
    saved = save_checkpoint(out, model.requires_grad_(False).eval(), raw, tokenizer_file, dtype=dtype, **provenance)
    shutil.rmtree(_state_directory(out), ignore_errors=True)
    result = evaluate(saved, rows)
    return saved.with_manifest(accuracy=Accuracy(data=describe(name, rows), child=result.accuracy))


def _state_directory(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")

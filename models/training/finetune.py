"""Classification fine-tuning, and recovery after pruning: the same objective from two starting points.

Legend: B texts, C classes, D model width, E experts.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.checkpoint import Checkpoint, Encoder, load_checkpoint, save_checkpoint, source_of
from models.classifier import Classifier, Experts, MoELayer
from models.config import Pooling
from models.dataset import Row, describe, label_ids, read_rows, split_rows
from models.errors import CheckpointError, ConfigError, DataError
from models.evaluate import evaluate
from models.images import ImageEncoder
from models.manifest import Accuracy
from models.progress import Progress, silent
from models.tokenizer import TOKENIZER_FILE, TextEncoder
from models.training.augment import ImageNoise, Noised, TextNoise, TokenSplitter
from models.training.config import TrainConfig
from models.training.initial import fresh_head
from models.training.loop import Step, train, training_device
from models.training.losses import ExpertTap, RouterTap, balance_loss, distillation_loss, router_entropy
from models.training.noise import Dropout


class Classification:
    """Cross-entropy on noised texts or images, plus a teacher's probabilities on the same ones if there is one, and its
    experts' outputs if config.expert_distill asks for them.

    Raises CheckpointError for a teacher whose experts are not the model's, one by one.
    """

    def __init__(
        self,
        model: Classifier,
        items: Sequence[Any],
        labels: Sequence[int],
        noised: Noised,
        config: TrainConfig,
        teacher: Classifier | None = None,
    ) -> None:
        self.model = model
        self.items = items
        self.label_N = torch.tensor(labels)
        self.noised = noised
        self.config = config
        self.teacher = teacher
        self.top_k = model.config.top_k
        self.teachers: dict[int, Experts] = {}
        self.expert_weight = 0.0
        if config.expert_distill and teacher is not None:
            self.teachers = matching_experts(model, teacher)
            self.expert_weight = config.expert_distill * self._starting_ratio()

    @torch.no_grad()
    def _starting_ratio(self) -> float:
        """Cross-entropy over the experts' loss on a first batch without noise, 0 if experts are their teachers'.

        Taken when the objective is made, so that a resumed run, whose weights come later, gets the same.
        """
        count, tokens = 0, 0
        while count < len(self.items) and (not count or tokens + len(self.items[count]) <= self.config.batch_tokens):
            tokens, count = tokens + len(self.items[count]), count + 1
        batch, tap = self.model.pack(self.items[:count]), ExpertTap(self.teachers)
        logits_BC = self.model.head(self.model.pooled(self.model.hidden(batch, tap), batch))
        wrong = float(F.cross_entropy(logits_BC.float(), self.label_N[:count].to(self.model.device)))
        apart = float(tap.loss)
        return wrong / apart if apart > 0 else 0.0

    def epoch(self, generator: np.random.Generator) -> list[tuple[int, Any]]:
        return [(row, self.noised(item, generator)) for row, item in enumerate(self.items)]

    def loss(self, step: Step) -> torch.Tensor:
        c = self.config
        if c.final_top_k:
            set_top_k(self.model, annealed(self.top_k, c.final_top_k, step.share))
        tap = ExpertTap(self.teachers) if self.teachers else RouterTap()
        batch = self.model.pack(step.sequences)
        x_TD = self.model.hidden(batch, tap, noise=Dropout(batch, c.dropout, c.path_dropout))
        logits_BC = self.model.head(F.dropout(self.model.pooled(x_TD, batch), c.head_dropout))
        label_B = self.label_N[list(step.rows)].to(self.model.device)
        loss = F.cross_entropy(logits_BC, label_B, label_smoothing=c.label_smoothing)
        if c.balance_loss:
            loss = loss + c.balance_loss * balance_loss(tap)
        if c.router_entropy:
            loss = loss + c.router_entropy * router_entropy(tap)
        if self.teacher is not None:
            with torch.no_grad():
                teacher_BC = self.teacher.classify(step.sequences).logits_BC.clone().to(self.model.device)
            loss = loss + c.distill * distillation_loss(logits_BC, teacher_BC, c.temperature)
        if isinstance(tap, ExpertTap):
            loss = loss + self.expert_weight * tap.loss
        return loss


def matching_experts(model: Classifier, teacher: Classifier) -> dict[int, Experts]:
    """The teacher's experts by layer. Raises CheckpointError unless each has a counterpart in the model."""
    if (model.config.family, model.config.width) != (teacher.config.family, teacher.config.width):
        raise CheckpointError(
            f"expert_distill needs a teacher of the family {model.config.family} and width {model.config.width}, "
            f"this one is {teacher.config.family} of width {teacher.config.width}"
        )
    found: dict[int, Experts] = {}
    for index in model.config.moe_layers:
        own = model.layers[index]
        other = teacher.layers[index] if index < len(teacher.layers) else None
        assert isinstance(own, MoELayer)
        if not isinstance(other, MoELayer) or other.shape.num_experts != own.shape.num_experts:
            count = other.shape.num_experts if isinstance(other, MoELayer) else 0
            raise CheckpointError(
                f"expert_distill matches experts one by one, but layer {index} has {own.shape.num_experts} and the "
                f"teacher's {count}: leave it out, or prune by a method that keeps all experts, such as moe-pruner"
            )
        found[index] = other.experts
    return found


def annealed(top_k: int, final: int, share: float) -> int:
    """Experts per token after a share of the training: from top_k in even steps to `final`, reached halfway."""
    return final + math.ceil((top_k - final) * max(0.0, 1 - 2 * share))


def set_top_k(model: Classifier, top_k: int) -> None:
    """Let every token choose so many experts from now on, and say so in the model's config."""
    if top_k == model.config.top_k:
        return
    model.config = replace(model.config, top_k=top_k)
    for layer in model.layers:
        assert isinstance(layer, MoELayer)
        layer.config, layer.policy = model.config, replace(layer.policy, top_k=top_k)


def finetune(
    base: Path,
    data: Path,
    out: Path,
    config: TrainConfig,
    pooling: Pooling | None = None,
    teacher: Path | None = None,
    dtype: str = "float32",
    progress: Progress = silent,
) -> Checkpoint:
    """Train a classifier on the train rows of `data` from a pretrained base, and write it to `out`.

    Classes are the labels of the rows, sorted. pooling: what the head sees of a text, None for the mean. The manifest
    records accuracy on the dev rows (a tenth held out where the file has no splits), how routers were trained, and how
    far each moved. Saved steps lie in `<out>.training`.
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
    record = fit(model, file, train_rows, labels, config, teacher, out, f"fine-tuning on {data.name}", progress)
    record["router_movement"] = router_movement(before, model)
    return save_judged(
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
    Rows that share an expert train it together, constants train like experts; what is frozen keeps its bits. The
    manifest keeps the record of the pruning and adds that of the recovery. Raises ConfigError if config.final_top_k is
    not below the checkpoint's top-k, and for config.expert_distill without a teacher.
    """
    _refuse_existing(out)
    start = load_checkpoint(checkpoint, dtype="float32")
    if start.problem_type != "single_label_classification":
        raise CheckpointError(
            f"{checkpoint.name}: problem_type is {start.problem_type}, recovery needs single-label rows"
        )
    train_rows, dev_rows = split_rows(read_rows(data), config.seed)
    config = replace(config, max_tokens=min(config.max_tokens, start.encoder.max_tokens))
    if config.expert_distill and teacher is None:
        raise ConfigError("expert_distill compares experts with a teacher's: give --teacher DIR")
    if config.final_top_k and config.final_top_k >= start.model.config.top_k:
        chosen = start.model.config.top_k
        raise ConfigError(f"final_top_k is {config.final_top_k}, must be below the {chosen} that tokens choose now")
    kept = start.manifest
    model = start.model.requires_grad_(True)
    frozen = freeze(model, config, is_tied=kept is not None and kept.semantics == "tie")
    before = router_weights(model)
    file = start.path / TOKENIZER_FILE
    record = fit(model, file, train_rows, start.labels, config, teacher, out, f"recovering on {data.name}", progress)
    if config.final_top_k:  # a run that was resumed past its last step never called the objective
        set_top_k(model, config.final_top_k)
    record["router_movement"] = router_movement(before, model)
    record["frozen"] = frozen
    carried = {} if kept is None else {name: getattr(kept, name) for name in CARRIED}
    earlier = kept.training if kept is not None else None
    return save_judged(
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


def freeze(model: Classifier, config: TrainConfig, is_tied: bool) -> list[str]:
    """Take from training what the config leaves as it is; returns the ends of the names of those parameters."""
    frozen = []
    if config.routers == "frozen" or (config.routers == "auto" and is_tied):
        frozen.append("w_router_ED")
    if config.freeze_constants:
        frozen.append("const_CD")
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(frozen)):
            parameter.requires_grad_(False)
    return frozen


def router_weights(model: Classifier) -> dict[int, torch.Tensor]:
    """A copy of each MoE layer's router: layer -> [E, D]."""
    layers = {i: model.layers[i] for i in model.config.moe_layers}
    return {i: layer.w_router_ED.detach().clone() for i, layer in layers.items() if isinstance(layer, MoELayer)}


def router_movement(before: dict[int, torch.Tensor], model: Classifier) -> list[float]:
    """Per MoE layer, the norm of the router's change over the norm it had."""
    after = router_weights(model)
    return [round(float((after[i] - before[i]).norm() / before[i].norm()), 4) for i in before]


def fit(
    model: Classifier,
    tokenizer_file: Path | None,
    rows: Sequence[Row],
    labels: tuple[str, ...],
    config: TrainConfig,
    teacher: Path | None,
    out: Path,
    message: str,
    progress: Progress,
) -> dict[str, object]:
    """Train on the rows; returns what the manifest records. tokenizer_file: None for a model of images."""
    encoder, noised = _reader(model, tokenizer_file, config)
    encoded = [encoder.encode(row.source).ids for row in rows]
    pairs = [(item, label) for item, label in zip(encoded, label_ids(rows, labels), strict=True) if len(item)]
    device = training_device()
    model.to(device)
    master = None
    if teacher is not None:
        master = load_checkpoint(teacher, device).model
        if master.config.num_labels != len(labels):
            raise CheckpointError(
                f"--teacher {teacher.name} has {master.config.num_labels} classes, the data {len(labels)}"
            )
    items, targets = [item for item, _ in pairs], [label for _, label in pairs]
    objective = Classification(model, items, targets, noised, config, master)
    record = train(model, objective, config, _state_directory(out), message, progress)
    model.to("cpu")
    return record | {"teacher": None if teacher is None else teacher.name}


def _reader(model: Classifier, tokenizer_file: Path | None, config: TrainConfig) -> tuple[Encoder, Noised]:
    """What turns inputs into items, and the noise on these."""
    if model.config.vision is not None:
        return ImageEncoder(model.config.vision, model.config.max_tokens), ImageNoise(config.shift)
    if tokenizer_file is None:
        raise ValueError("a model of texts needs its tokenizer")
    # A text keeps three times the length, so that random windows have something to choose from.
    encoder = TextEncoder(tokenizer_file, 3 * config.max_tokens, model.config.vocab_size)
    return encoder, TextNoise(TokenSplitter(tokenizer_file), config)


def save_judged(
    out: Path,
    model: Classifier,
    raw: dict[str, Any],
    tokenizer_file: Path | None,
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

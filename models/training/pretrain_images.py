"""Supervised pretraining of a small V-MoE from scratch on labelled images, as its paper does on far more of them."""

from pathlib import Path

from models.architecture import build
from models.checkpoint import Checkpoint
from models.dataset import label_ids, read_rows, split_rows
from models.errors import CheckpointError, DataError
from models.hf_config import parse_config
from models.progress import Progress, silent
from models.training.config import TrainConfig
from models.training.finetune import fit, save_judged
from models.training.initial import initialize, new_image_config


def pretrain_images(
    data: Path,
    out: Path,
    config: TrainConfig,
    size: str = "demo",
    dtype: str = "float32",
    progress: Progress = silent,
) -> Checkpoint:
    """Train a classifier of the images' own labels, whose body is a base for other tasks, and write it to `out`.

    The model's image size and channels are those of the first image. Saved steps lie in `<out>.training`. Raises
    ConfigError for an unknown size, DataError for rows without images or of one class, CheckpointError if `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")
    train_rows, dev_rows = split_rows(read_rows(data), config.seed)
    labels = tuple(sorted({row.label for row in train_rows}))
    first = train_rows[0].image
    if first is None:
        raise DataError(f"{data.name}: rows are texts, a V-MoE reads images from an .npz file")
    if len(labels) < 2:
        raise DataError(f"{data.name}: train rows have {len(labels)} class, a classifier needs at least 2")
    label_ids(dev_rows, labels)
    channels = 1 if first.ndim == 2 else first.shape[2]
    raw = new_image_config(size, (first.shape[0], first.shape[1]), channels, labels)
    model = build(parse_config(raw))
    initialize(model, config.seed)
    record = fit(model, None, train_rows, labels, config, None, out, f"pretraining {out.name}", progress)
    return save_judged(out, model, raw, None, dev_rows or train_rows, data.name, dtype, training=record)

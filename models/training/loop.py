"""The training loop: deterministic by seed, and resumable at any step to the same bits.

Nothing random outlives a step: the order and noise of an epoch's texts come from (seed, epoch), dropout from
(seed, epoch, step). So a saved step number is all the random state there is.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models.errors import SecateurError
from models.progress import Progress
from models.training.config import TrainConfig
from models.training.optim import Optimizers

SAVE_EVERY_STEPS = 100
STATE_FILE = "state.safetensors"
MODULE = "module."


class TrainingError(SecateurError):
    """Training that cannot go on: a loss that is no number, or a saved state of another run."""


@dataclass(frozen=True)
class Step:
    """One batch: token ids of each text, and the index of the row each came from. share: of the training before it."""

    sequences: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    share: float = 0.0


class Objective(Protocol):
    """What is trained: the texts of an epoch, already noised, and the loss of one batch."""

    def epoch(self, generator: np.random.Generator) -> Sequence[tuple[int, tuple[int, ...]]]:
        """(row index, token ids) of each text of an epoch."""
        ...

    def loss(self, step: Step) -> torch.Tensor:
        """A scalar with gradients."""
        ...


def train(
    trained: nn.Module, objective: Objective, config: TrainConfig, state: Path | None, message: str, progress: Progress
) -> dict[str, Any]:
    """Run all epochs; returns what the manifest records. What takes no gradient stays as it is.

    state: a directory for the run's saved step, which the caller removes once the result is safe; None trains without
    saving. Raises TrainingError if the loss stops being finite, or the state is broken or of another configuration.
    """
    named = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    optimizers = Optimizers(named.items(), config)
    fingerprint = json.dumps({"config": asdict(config), "shapes": {n: list(p.shape) for n, p in named.items()}})
    first_epoch, first_step = _restore(state, trained, optimizers, fingerprint)
    loss_sum, loss_count, since_saved = 0.0, 0, 0
    epochs = max(config.epochs, math.ceil(config.min_steps / len(epoch_steps(objective, config, 0))))
    for epoch in range(first_epoch, epochs):
        steps = epoch_steps(objective, config, epoch)
        for number in range(first_step, len(steps)):
            torch.manual_seed(step_seed(config.seed, epoch, number))
            loss = objective.loss(replace(steps[number], share=(epoch + number / len(steps)) / epochs))
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"loss is {loss.item()} in epoch {epoch + 1}, step {number + 1}: lower the learning rates"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            share = (epoch + (number + 1) / len(steps)) / epochs
            optimizers.step(share)
            loss_sum, loss_count = loss_sum + float(loss.detach()), loss_count + 1
            progress(round(share * 1000), 1000, f"{message}, epoch {epoch + 1}, loss {loss_sum / loss_count:.3f}")
            since_saved += 1
            if state is not None and since_saved >= SAVE_EVERY_STEPS:
                _save(state, trained, optimizers, fingerprint, epoch, number + 1)
                since_saved = 0
        first_step, loss_sum, loss_count = 0, loss_sum / max(loss_count, 1), 1
    return {"config": asdict(config), "loss": loss_sum, "router_optimizer": config.router_optimizer}


def training_device() -> str:
    """The first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def epoch_steps(objective: Objective, config: TrainConfig, epoch: int) -> list[Step]:
    """The epoch's batches: texts of like length together (with some disorder), the batches in random order."""
    generator = np.random.default_rng([config.seed, epoch])
    texts = objective.epoch(generator)
    length_N = np.array([len(ids) for _, ids in texts])
    order = np.argsort(length_N * generator.uniform(1.0, 1.3, len(texts)), kind="stable")
    steps: list[Step] = []
    batch: list[int] = []
    longest = 0
    for index in order.tolist():
        longest = max(longest, int(length_N[index]))
        if batch and longest * (len(batch) + 1) > config.batch_tokens:
            steps.append(_step(texts, batch))
            batch, longest = [], int(length_N[index])
        batch.append(index)
    steps.append(_step(texts, batch))
    return [steps[i] for i in generator.permutation(len(steps))]


def step_seed(seed: int, epoch: int, number: int) -> int:
    """A torch seed of its own for every step."""
    return int(np.random.SeedSequence([seed, epoch, number]).generate_state(1, np.uint64)[0])


def _step(texts: Sequence[tuple[int, tuple[int, ...]]], batch: list[int]) -> Step:
    return Step(tuple(texts[i][1] for i in batch), tuple(texts[i][0] for i in batch))


def _save(state: Path, trained: nn.Module, optimizers: Optimizers, fingerprint: str, epoch: int, step: int) -> None:
    state.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODULE}{name}": t.detach() for name, t in trained.state_dict().items()} | optimizers.tensors()
    temporary = state / f".{STATE_FILE}.tmp"
    save_file(tensors, temporary, metadata={"fingerprint": fingerprint, "epoch": str(epoch), "step": str(step)})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(state / STATE_FILE)


def _restore(state: Path | None, trained: nn.Module, optimizers: Optimizers, fingerprint: str) -> tuple[int, int]:
    if state is None or not (state / STATE_FILE).exists():
        return 0, 0
    try:
        with safe_open(state / STATE_FILE, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
    except SafetensorError as error:
        raise TrainingError(f"{state} holds a broken file ({error}): remove it to start anew") from None
    if metadata.get("fingerprint") != fingerprint:
        raise TrainingError(f"{state} holds a run with another configuration: remove it to start anew")
    module = {name.removeprefix(MODULE): tensors.pop(name) for name in list(tensors) if name.startswith(MODULE)}
    trained.load_state_dict(module)
    optimizers.restore(tensors)
    return int(metadata["epoch"]), int(metadata["step"])

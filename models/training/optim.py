"""Optimisers by parameter group, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from models.training.config import TrainConfig

WARM_UP = 0.06
FLOOR = 0.02
MOMENTUM = 0.9
BETAS = (0.9, 0.98)
CLIP_NORM = 1.0


def schedule(progress: float) -> float:
    """Share of the peak rate at a share of the training: linear warm-up, then cosine down to FLOOR."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


# Matrices by shape, but embeddings, biases of experts and constants by what they are: decay would only shrink them.
PLAIN = ("embedding_VD", "const_CD", "class_1D", "position_LD", "b_in_PG", "b_out_PD")


class Optimizers:
    """AdamW for matrices, embeddings and norms; routers under SGD with momentum and no decay, unless asked not to."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        routers: list[nn.Parameter] = []
        trunk: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []  # embeddings, norms and constants, which decay would only shrink
        for name, parameter in named:
            if name.endswith("w_router_ED"):
                routers.append(parameter)
            elif parameter.ndim < 2 or name.endswith(PLAIN):
                plain.append(parameter)
            else:
                (trunk if name.startswith("layers.") else outer).append(parameter)
        groups = [
            {"params": trunk, "peak": config.learning_rate * config.trunk_rate, "weight_decay": config.weight_decay},
            {"params": outer, "peak": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": plain, "peak": config.learning_rate, "weight_decay": 0.0},
        ]
        router_group = {"params": routers, "peak": config.router_learning_rate, "weight_decay": 0.0}
        if config.router_optimizer == "adamw":
            groups.append(router_group)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=BETAS, fused=True)
        ]
        if config.router_optimizer == "sgd" and routers:
            self.optimizers.append(torch.optim.SGD([router_group], lr=config.router_learning_rate, momentum=MOMENTUM))
        self.parameters = [*trunk, *outer, *plain, *routers]

    def step(self, progress: float) -> None:
        """Clip the gradient's norm, set the rates for this share of the training, update, and clear gradients."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as named tensors, for a safetensors file."""
        return {
            f"optimizer.{number}.{index}.{key}": value
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for number, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            for name, value in tensors.items():
                kind, owner, index, key = name.split(".")
                if kind == "optimizer" and int(owner) == number:
                    state["state"].setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(state)

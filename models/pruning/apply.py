"""The only place that changes weights: from a model and one plan per layer to a smaller model.

Legend: E experts before, K after, D model width, C constant rows.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from kernels.routing import FIRST_CONSTANT
from models.config import LayerShape, ModelConfig
from models.decoder import DecoderLayer, MoEClassifier
from models.errors import PlanError
from models.pruning.plan import IntArray, LayerPlan


def apply(model: MoEClassifier, plans: Mapping[int, LayerPlan]) -> MoEClassifier:
    """A new model with the planned experts; every other tensor is shared with the old model, not copied.

    Raises PlanError if a planned layer has lost experts before (its router no longer matches its experts) or if a
    `slice` plan keeps fewer experts than top-k chooses.
    """
    shapes = list(model.config.layers)
    for index, plan in plans.items():
        shapes[index] = _new_shape(model.config, index, plan)
    pruned = MoEClassifier(replace(model.config, layers=tuple(shapes)), model.dtype, "meta")
    pruned.backend = model.backend
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for index, plan in plans.items():
        layer = model.layers[index]
        assert isinstance(layer, DecoderLayer)
        tensors |= {f"layers.{index}.{name}": value for name, value in _planned_tensors(layer, plan).items()}
    for name, _ in list(pruned.named_parameters()):
        owner, _, short = name.rpartition(".")
        parameter = torch.nn.Parameter(tensors[name].detach(), requires_grad=False)
        setattr(pruned.get_submodule(owner), short, parameter)
    pruned.rope = model.rope
    for index, plan_layer in enumerate(pruned.layers):
        plan_layer.table_VE = torch.tensor([shapes[index].route_E], dtype=torch.int32, device=model.device)
    return pruned.eval()


def _new_shape(config: ModelConfig, index: int, plan: LayerPlan) -> LayerShape:
    old = config.layers[index]
    if old != LayerShape.unpruned(old.num_experts) or plan.route_E.size != old.num_experts:
        raise PlanError(f"layer {index} was pruned before with router rows left in place: prune its parent instead")
    if plan.semantics == "slice":
        if plan.keep < config.top_k:
            raise PlanError(
                f"layer {index} would keep {plan.keep} experts, fewer than the {config.top_k} each token chooses"
            )
        return LayerShape.unpruned(plan.keep)
    return LayerShape(plan.keep, tuple(_encode(plan).tolist()))


def _encode(plan: LayerPlan) -> IntArray:
    """Route in the kernels' slots: dropped rows become -1, or -2, -3, ... under `constant`."""
    route = plan.route_E.copy()
    dropped = np.flatnonzero(route < 0)
    route[dropped] = FIRST_CONSTANT - np.arange(dropped.size) if plan.semantics == "constant" else -1
    return route


def _planned_tensors(layer: DecoderLayer, plan: LayerPlan) -> dict[str, torch.Tensor]:
    mix_KE = torch.from_numpy(plan.mix_KE).to(layer.w_in_PGD.device)
    tensors = {name: _mixed(getattr(layer, name), mix_KE) for name in ("w_in_PGD", "w_out_PDF")}
    if plan.semantics == "slice":
        tensors["w_router_ED"] = _mixed(layer.w_router_ED, mix_KE)
    if plan.semantics == "constant" and plan.const_ED is not None and (plan.route_E < 0).any():
        tensors["const_CD"] = torch.from_numpy(plan.const_ED[plan.route_E < 0]).to(layer.w_in_PGD)
    return tensors


def _mixed(weight: torch.Tensor, mix_KE: torch.Tensor) -> torch.Tensor:
    """[E, ...] -> [K, ...]: row selection where every row is one-hot, so bits are kept; weighted sums in float64."""
    if ((mix_KE == 0) | (mix_KE == 1)).all():
        return weight.detach()[mix_KE.argmax(1)].clone()
    mixed: torch.Tensor = torch.tensordot(mix_KE, weight.detach().double(), dims=1)
    return mixed.to(weight.dtype)

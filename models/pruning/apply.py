"""The only place that changes weights: from a model and one plan per layer to a smaller model.

Legend: E experts before, K after, D model width, F expert inner width, G = 2F (F if not gated), C constant rows.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kernels.routing import FIRST_CONSTANT
from models.architecture import build
from models.classifier import Classifier, MoELayer
from models.compressed import compressed_buffers
from models.config import LayerShape, ModelConfig
from models.errors import PlanError
from models.pruning.align import matching, permuted
from models.pruning.compress import compressed, compression
from models.pruning.plan import FloatArray, IntArray, LayerPlan
from models.pruning.post import Factor, Mask, Neurons, Project

Stacks = tuple[torch.Tensor, torch.Tensor]


def apply(model: Classifier, plans: Mapping[int, LayerPlan], allow_lower_k: bool = False) -> Classifier:
    """A new model with the planned experts; every other tensor is shared with the old model, not copied.

    allow_lower_k: if `slice` plans leave every MoE layer the same number of experts, fewer than top-k, then every token
    chooses that many instead. Raises PlanError if a planned layer has lost experts before (its router no longer matches
    its experts), if a `slice` plan keeps fewer experts than top-k otherwise, or where experts choose tokens.
    """
    shapes = list(model.config.layers)
    for index, plan in plans.items():
        shapes[index] = _new_shape(model.config, index, plan)
    config = replace(model.config, layers=tuple(shapes), top_k=_new_top_k(model.config, shapes, allow_lower_k))
    pruned = build(config, model.dtype, "meta")
    pruned.backend = model.backend
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for index, plan in plans.items():
        layer = model.layers[index]
        assert isinstance(layer, MoELayer)
        tensors |= {f"layers.{index}.{name}": value for name, value in _planned_tensors(layer, plan).items()}
    for name, _ in list(pruned.named_parameters()):
        owner, _, short = name.rpartition(".")
        parameter = torch.nn.Parameter(tensors[name].detach(), requires_grad=False)
        setattr(pruned.get_submodule(owner), short, parameter)
    for index in pruned.config.moe_layers:
        for name in compressed_buffers(config, shapes[index]):
            setattr(pruned.layers[index], name, tensors[f"layers.{index}.{name}"])
    for name, buffer in model.named_buffers(recurse=False):
        setattr(pruned, name, buffer)
    for index, plan_layer in enumerate(pruned.layers):
        plan_layer.table_VE = torch.tensor([shapes[index].route_E], dtype=torch.int32, device=model.device)
    return pruned.eval()


def _new_shape(config: ModelConfig, index: int, plan: LayerPlan) -> LayerShape:
    old = config.layers[index]
    if old.compression is not None:
        raise PlanError(f"layer {index} is compressed already: prune its parent instead")
    if old != LayerShape.unpruned(old.num_experts) or plan.route_E.size != old.num_experts:
        raise PlanError(f"layer {index} was pruned before with router rows left in place: prune its parent instead")
    if plan.semantics == "slice":
        if config.vision is not None and config.vision.capacity:
            raise PlanError(
                f"layer {index}: experts choose their tokens by a softmax over all router rows, so that removing one "
                "would change every gate: use zero, which leaves the rows in place"
            )
        route_E: tuple[int, ...] = tuple(range(plan.keep))
    else:
        route_E = tuple(_encode(plan).tolist())
    last = _compressing(plan)
    return LayerShape(plan.keep, route_E, None if last is None else compression(config, last))


def _compressing(plan: LayerPlan) -> Factor | Mask | None:
    """The step that gives the experts another form, which nothing can follow."""
    if any(isinstance(step, Factor | Mask) for step in plan.post[:-1]):
        raise PlanError("compressing experts must be the last step of a plan")
    last = plan.post[-1] if plan.post else None
    return last if isinstance(last, Factor | Mask) else None


def _new_top_k(config: ModelConfig, shapes: list[LayerShape], allow_lower_k: bool) -> int:
    """The decoder chooses equally many experts in every layer, so that fewer is possible in all of them or in none."""
    rows = {index: shapes[index].num_rows for index in config.moe_layers}
    short = [index for index, count in rows.items() if count < config.top_k]
    if not short:
        return config.top_k
    first = short[0]
    if not allow_lower_k:
        raise PlanError(
            f"layer {first} would keep {rows[first]} experts, fewer than the {config.top_k} each token chooses"
        )
    if len(set(rows.values())) > 1:
        raise PlanError(
            f"layer {first} would keep {rows[first]} experts, fewer than top-{config.top_k}, and other layers more: "
            "tokens choose equally many in every layer, so keep the same number everywhere or at least "
            f"{config.top_k}"
        )
    return rows[first]


def _encode(plan: LayerPlan) -> IntArray:
    """Route in the kernels' slots: dropped rows become -1, or -2, -3, ... under `constant`."""
    route = plan.route_E.copy()
    dropped = np.flatnonzero(route < 0)
    route[dropped] = FIRST_CONSTANT - np.arange(dropped.size) if plan.semantics == "constant" else -1
    return route


def _planned_tensors(layer: MoELayer, plan: LayerPlan) -> dict[str, torch.Tensor]:
    old = _neurons(layer), layer.w_out_PDF.detach()
    aligned = _aligned(old, plan.mix_KE) if plan.align else old
    new = _mixed(aligned[0], plan.mix_KE), _mixed(aligned[1], plan.mix_KE)
    for step in plan.post:
        match step:
            case Project():
                new = _project(new, aligned, plan.mix_KE, step)
            case Neurons():
                new = _add_neurons(new, old, step)
    tensors = {"w_in_PGD": new[0], "w_out_PDF": new[1]}
    if layer.experts.b_in_PG is not None:
        tensors |= {"w_in_PGD": new[0][:, :, :-1].contiguous(), "b_in_PG": new[0][:, :, -1].contiguous()}
    if (last := _compressing(plan)) is not None:
        tensors |= compressed(layer.config, tensors.pop("w_in_PGD"), tensors.pop("w_out_PDF"), last)
    if layer.experts.b_out_PD is not None:
        tensors["b_out_PD"] = _mixed(layer.experts.b_out_PD.detach(), plan.mix_KE)
    if plan.semantics == "slice":
        mix_KE = plan.mix_KE if plan.router_mix_KE is None else plan.router_mix_KE
        tensors["w_router_ED"] = _mixed(layer.w_router_ED.detach(), mix_KE)
    if plan.semantics == "constant" and plan.const_ED is not None and (plan.route_E < 0).any():
        tensors["const_CD"] = torch.from_numpy(plan.const_ED[plan.route_E < 0]).to(layer.w_in_PGD)
    return tensors


def _neurons(layer: MoELayer) -> torch.Tensor:
    """The experts' rows, each with its bias, where there is one, as a last column: it goes wherever its neuron goes."""
    w_in_PGD, b_in_PG = layer.w_in_PGD.detach(), layer.experts.b_in_PG
    return w_in_PGD if b_in_PG is None else torch.cat((w_in_PGD, b_in_PG.detach().unsqueeze(2)), dim=2)


def _mixed(weight: torch.Tensor, mix_KE: FloatArray) -> torch.Tensor:
    """[E, ...] -> [K, ...]: a one-hot row selects, which keeps the bits; any other is a weighted sum in float64."""
    new = torch.empty((len(mix_KE), *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
    for slot, share_E in enumerate(mix_KE):
        members = np.flatnonzero(share_E)
        if members.size == 1 and share_E[members[0]] == 1.0:
            new[slot] = weight[members[0]]
        else:
            new[slot] = sum(float(share_E[e]) * weight[e].double() for e in members)
    return new


def _aligned(old: Stacks, mix_KE: FloatArray) -> Stacks:
    """Every member of a group with its neurons in the order of the group's heaviest, ties the lowest."""
    w_in, w_out = old[0].clone(), old[1].clone()
    for share_E in mix_KE:
        reference = int(share_E.argmax())
        for expert in np.flatnonzero(share_E):
            if expert != reference:
                neuron_F = matching(old[0][expert], old[1][expert], old[0][reference], old[1][reference])
                w_in[expert], w_out[expert] = permuted(old[0][expert], old[1][expert], neuron_F)
    return w_in, w_out


def _project(new: Stacks, old: Stacks, mix_KE: FloatArray, step: Project) -> Stacks:
    """U_r U_r^T of each merged matrix, gate, up and down each for itself; a group of one stays as it is.

    U are the left singular vectors of the members' matrices side by side: the eigenvectors of the sum of W W^T.
    """
    width = old[1].shape[2]
    for slot, members_E in enumerate(step.members_KE):
        members = np.flatnonzero(members_E)
        if members.size < 2:
            continue
        blocks = zip(*(torch.split(w, width) for w in (new[0][slot], *old[0][members])), strict=True)
        new[0][slot] = torch.cat([_projected(merged, parts, step.rank) for merged, *parts in blocks])
        new[1][slot] = _projected(new[1][slot], [old[1][e] for e in members], step.rank)
    return new


def _projected(merged: torch.Tensor, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    if rank >= merged.shape[0]:
        return merged
    gram = sum((part.double() @ part.double().T for part in parts), torch.zeros((), dtype=torch.float64))
    leading: torch.Tensor = torch.linalg.eigh(gram)[1][:, -rank:]  # eigenvalues ascend
    return (leading @ (leading.T @ merged.double())).to(merged.dtype)


def _add_neurons(new: Stacks, old: Stacks, step: Neurons) -> Stacks:
    """Foreign neurons averaged into their places; places that receive none keep their bits."""
    width = old[1].shape[2]
    place_J = step.to_J * width + step.at_J
    places, slot_J = np.unique(place_J, return_inverse=True)
    received = np.bincount(slot_J, weights=step.weight_J, minlength=places.size)
    own = step.own_KF.reshape(-1)[places]
    to, at = torch.from_numpy(places // width), torch.from_numpy(places % width)
    given = torch.from_numpy(step.expert_J), torch.from_numpy(step.neuron_J)
    averaged = partial(
        _averaged,
        own=torch.from_numpy(own),
        weight_J=torch.from_numpy(step.weight_J),
        slot_J=torch.from_numpy(slot_J),
        total=torch.from_numpy(own + received),
    )
    for first in range(0, old[0].shape[1], width):  # gate rows, then up rows
        new[0][to, first + at] = averaged(new[0][to, first + at], old[0][given[0], first + given[1]])
    new[1][to, :, at] = averaged(new[1][to, :, at], old[1][given[0], :, given[1]])
    return new


def _averaged(
    mine: torch.Tensor,
    theirs: torch.Tensor,
    own: torch.Tensor,
    weight_J: torch.Tensor,
    slot_J: torch.Tensor,
    total: torch.Tensor,
) -> torch.Tensor:
    """(own * mine + the weighted sum of what each place is given) / total: rows of [places, D]."""
    mass = mine.double() * own.to(mine.device)[:, None]
    mass.index_add_(0, slot_J.to(mine.device), theirs.double() * weight_J.to(mine.device)[:, None])
    return (mass / total.to(mine.device)[:, None]).to(mine.dtype)

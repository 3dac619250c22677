"""From dense matrices to forms that take fewer bytes: what `apply` does for the last step of a plan.

Legend: K experts, G = 2F (F if not gated), D model width, F expert inner width. Of one matrix: Y rows, X columns,
M values kept per row, L rank, Q lines of the residual.
"""

import re
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from kernels.compressed import pack
from models.compressed import is_gated, matrix_sizes
from models.config import Bitmask, Compression, Form, LowRank, ModelConfig
from models.errors import PlanError
from models.pruning.post import Factor, Mask

FloatArray = npt.NDArray[np.float64]


def compression(config: ModelConfig, step: Factor | Mask) -> Compression:
    """The forms that the step gives to each of an expert's matrices. Raises PlanError for one that does not fit."""
    form = partial(_factored, step) if isinstance(step, Factor) else partial(_masked, step)
    return Compression(**{name: form(name, *size) for name, size in matrix_sizes(config).items()})


def _factored(step: Factor, name: str, height: int, width: int) -> Form:
    lines = round(step.ratio * (height if step.structure == "row" else width))
    return LowRank(min(step.rank, height, width), lines, step.structure)


def _masked(step: Mask, name: str, height: int, width: int) -> Form | None:
    return read_pattern(step.pattern, width) if name in step.targets else None


def read_pattern(pattern: str, width: int) -> Bitmask:
    """`0.5`: half of each row's values are zeroed, rounded down; `2:4`: two of each four columns are kept.

    Raises PlanError for anything else, and for groups that do not divide the width.
    """
    groups = re.fullmatch(r"(\d+):(\d+)", pattern)
    if groups:
        kept, group = int(groups[1]), int(groups[2])
        if not 0 < kept < group:
            raise PlanError(f"pattern is {pattern!r}: of each {group} columns, 1 to {group - 1} can be kept")
        if width % group:
            raise PlanError(f"pattern is {pattern!r}, but a row of {width} columns is no multiple of {group}")
        return Bitmask(kept, group)
    share = float(pattern) if re.fullmatch(r"0?\.\d+", pattern) else 0.0
    zeros = int(round(share * width, 6))
    if not zeros:
        raise PlanError(f"pattern is {pattern!r}, must be the share to zero such as 0.5, or N:M such as 2:4")
    return Bitmask(width - zeros, width)


def compressed(
    config: ModelConfig, w_in_KGD: torch.Tensor, w_out_KDF: torch.Tensor, step: Factor | Mask
) -> dict[str, torch.Tensor]:
    """The experts' tensors by name (models.compressed), from their dense stacks."""
    inner = torch.split(w_in_KGD, config.expert_width, dim=1)
    stacks = {"up": inner[-1], "down": w_out_KDF} | ({"gate": inner[0]} if is_gated(config) else {})
    forms = compression(config, step)
    tensors: dict[str, torch.Tensor] = {}
    for name, w_KYX in stacks.items():
        form = getattr(forms, name)
        norm_KX = step.down_KF if name == "down" else step.inner_KD
        match form:
            case None:
                found = {"PYX": w_KYX.clone()}
            case Bitmask():
                found = _packed(w_KYX, norm_KX, form)
            case LowRank():
                parts = [_low_rank(w_YX, None if norm_KX is None else norm_KX[k], form) for k, w_YX in enumerate(w_KYX)]
                found = {suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]}
        tensors |= {f"w_{name}_{suffix}": tensor.contiguous() for suffix, tensor in found.items()}
    return tensors


def kept_values(w_YX: torch.Tensor, norm_X: npt.ArrayLike | None, form: Bitmask) -> torch.Tensor:
    """bool [Y, X]: in each group of a row, the values with the greatest |w| * norm of their column, ties the lower."""
    score_YX = w_YX.detach().double().abs()
    if norm_X is not None:
        score_YX = score_YX * torch.from_numpy(np.asarray(norm_X, dtype=np.float64)).to(w_YX.device)
    score = torch.unflatten(score_YX, 1, (-1, form.group))
    best = torch.argsort(score, dim=-1, descending=True, stable=True)[..., : form.kept]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def _packed(w_KYX: torch.Tensor, norm_KX: FloatArray | None, form: Bitmask) -> dict[str, torch.Tensor]:
    kept = [kept_values(w_YX, None if norm_KX is None else norm_KX[k], form) for k, w_YX in enumerate(w_KYX)]
    packed = pack(w_KYX, torch.stack(kept))
    return {"value_PYM": packed.value_PYM, "mask_PYB": packed.mask_PYB}


def _low_rank(w_YX: torch.Tensor, norm_X: npt.ArrayLike | None, form: LowRank) -> dict[str, torch.Tensor]:
    """U V by singular value decomposition in float64, and the lines of the residual that weigh most.

    The residual is what is left after U and V were rounded to the stored dtype, so that it repairs their rounding too.
    """
    w64_YX = w_YX.double()
    u_YZ, value_Z, v_ZX = torch.linalg.svd(w64_YX, full_matrices=False)
    root_L = value_Z[: form.rank].sqrt()
    u_YL = (u_YZ[:, : form.rank] * root_L).to(w_YX.dtype)
    v_LX = (root_L[:, None] * v_ZX[: form.rank]).to(w_YX.dtype)
    parts = {"u_PYL": u_YL, "v_PLX": v_LX}
    if not form.lines:
        return parts
    rest_YX = w64_YX - u_YL.double() @ v_LX.double()
    weighted_YX = rest_YX
    if norm_X is not None:
        weighted_YX = rest_YX * torch.from_numpy(np.asarray(norm_X, dtype=np.float64)).to(w_YX.device)
    importance = torch.linalg.vector_norm(weighted_YX, dim=1 if form.structure == "row" else 0)
    index_Q = torch.argsort(importance, descending=True, stable=True)[: form.lines].sort().values
    if form.structure == "row":
        parts["rows_PQX"] = rest_YX[index_Q].to(w_YX.dtype)
    else:
        parts["cols_PYQ"] = rest_YX[:, index_Q].to(w_YX.dtype)
    return parts | {"index_PQ": index_Q.to(torch.int32)}

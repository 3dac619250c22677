"""These kernels as an experts implementation of `transformers`, and its models without the experts they do not need.

    register()                                                              # once, before a model is made
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="secateur")
    keep_experts(model.model.layers[0].mlp.experts, keep=[0, 2, 5])         # optional, for each layer

`register` is all it takes to run the experts of a model there. `keep_experts` drops experts of one layer and leaves the
router alone: it goes on choosing among all of them. That serves three of the four routing semantics (zero, tie,
constant); `slice` changes what the router chooses, so the router itself has to be sliced.

The kernels are for inference. While gradients are enabled and anything here needs one, the differentiable reference
runs. Modules that compute something else (see `_obstacle`) keep their own forward, which is said once per class; once
experts have been dropped from a module there is nothing to fall back to, and it raises ValueError instead. Weights in
8-bit floats have a registry of their own in `transformers`, where the name "secateur" is unknown.

Legend: T tokens, K chosen experts per token, E experts that the router knows, P experts kept, V = 1 row of the table,
C constant vectors, D model width, F expert inner width, G = 2F (F if not gated). Written against transformers 5.23;
5.17 differs in what is noted below.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from kernels.moe import BACKENDS, select_backend
from kernels.routing import FIRST_CONSTANT, SKIP, Activation, ExpertWeights, Survivors

logger = logging.getLogger("secateur.kernels")

NAME = "secateur"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# By the class that `transformers` makes of a config's `hidden_act`, or the function that a model names itself.
ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu_erf",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
    "GELU(none)": "gelu_erf",
    "GELU(tanh)": "gelu_tanh",
}


def register() -> None:
    """Make `experts_implementation="secateur"` known to `transformers`; calling it again changes nothing.

    Raises ImportError, naming the extra to install, if `transformers` is missing or older than its experts registry.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            f"transformers >= 5.17 cannot be imported ({error}), install the extra `transformers`: "
            "pip install -e '.[transformers]'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def keep_experts(
    experts: nn.Module,
    keep: Sequence[int],
    instead: Mapping[int, int | torch.Tensor] | None = None,
    survivors: Survivors = "keep",
) -> None:
    """Drop all but some experts of a module of `transformers`, in place; the router stays as it is.

    keep: the experts whose weights stay; the others' memory is freed. instead: what stands in for a dropped expert: a
    kept expert (tie), or a vector [D] that is added with the expert's weight (constant); a dropped expert without an
    entry adds nothing (zero). survivors: whether the weights of a token's other choices make up for those that add
    nothing, as in `RouterPolicy`.
    Parameters stay the same objects, so make an optimizer afterwards. The dropped experts are gone from `state_dict()`;
    what `save_pretrained` writes then is no checkpoint that `transformers` can load.
    Raises ValueError if the kernels cannot run the module, if it has been pruned before, or if the arguments contradict
    each other or its weights. From then on the module refuses to run by any other experts implementation.
    """
    module: Any = experts
    instead = dict(instead or {})
    obstacle = _obstacle(module) or _obstacle_to_dropping(module)
    if obstacle is not None:
        raise ValueError(f"cannot drop experts from {type(module).__name__}: {obstacle}")
    num_experts, width = module.down_proj.shape[:2]
    dropped = set(range(num_experts)) - set(keep)
    if not keep or len(keep) + len(dropped) != num_experts:
        raise ValueError(f"keep is {list(keep)}, must be one or more different experts of 0 .. {num_experts - 1}")
    if not set(instead) <= dropped:
        raise ValueError(f"instead has entries for {sorted(instead)}, must be for dropped experts only")

    constants: list[torch.Tensor] = []
    table_E = [SKIP] * num_experts
    for slot, expert in enumerate(keep):
        table_E[expert] = slot
    for expert, substitute in instead.items():
        if isinstance(substitute, torch.Tensor):
            if substitute.shape != (width,):
                raise ValueError(f"instead[{expert}] has the shape {tuple(substitute.shape)}, must be ({width},)")
            table_E[expert] = FIRST_CONSTANT - len(constants)
            constants.append(substitute.detach())
        elif substitute in keep:
            table_E[expert] = table_E[substitute]
        else:
            raise ValueError(f"instead[{expert}] is {substitute}, must be a kept expert or a vector")

    like = module.down_proj
    index_P = torch.tensor(keep, device=like.device)
    for name in _stacks(module).values():
        parameter = getattr(module, name)
        parameter.data = parameter.data.index_select(0, index_P)
        parameter.grad = None
    table_VE = torch.tensor([table_E], dtype=torch.int32, device=like.device)
    const_CD = torch.stack(constants).to(like.device, like.dtype) if constants else None
    module.secateur = KeptExperts(table_VE, const_CD, survivors)
    module.register_forward_pre_hook(_require_this_implementation)


class KeptExperts(nn.Module):
    """What `keep_experts` leaves on a module: the slot of each expert that the router may choose, and the constants.

    table_VE: int32 [1, E]. const_CD: [C, D] in the weights' dtype, or None. kept_share: as in ExpertWeights, for a
    router that uses all its experts alike.
    """

    def __init__(self, table_VE: torch.Tensor, const_CD: torch.Tensor | None, survivors: Survivors) -> None:
        super().__init__()
        self.table_VE = nn.Buffer(table_VE)
        self.const_CD = None if const_CD is None else nn.Buffer(const_CD)
        self.survivors = survivors
        self.kept_share = float((table_VE >= 0).float().mean())


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function that `transformers` calls as the forward of an experts module.

    hidden_states: [T, D]; top_k_index: int [T, K], of which ids that name no expert add nothing (expert parallelism
    marks the choices of other ranks with E, 5.17 with anything from E on); top_k_weights: float [T, K]. Returns [T, D].
    """
    kept = _kept(self)
    obstacle = _obstacle(self)
    if obstacle is None and hidden_states.dtype != self.down_proj.dtype:
        obstacle = f"its weights are {self.down_proj.dtype}, its input is {hidden_states.dtype}"
    if obstacle is not None:
        if kept is not None:
            raise ValueError(f"cannot run {type(self).__name__} without the experts that were dropped: {obstacle}")
        _log_fallback(type(self).__name__, obstacle)
        result: torch.Tensor = _original_forward(type(self))(self, hidden_states, top_k_index, top_k_weights)
        return result

    stacks = {field: getattr(self, name) for field, name in _stacks(self).items()}
    experts = ExpertWeights(
        **stacks,
        const_CD=None if kept is None else kept.const_CD,
        activation=ACTIVATIONS[_activation_name(self.act_fn)],
        gated=self.has_gate,
        kept_share=1.0 if kept is None else kept.kept_share,
    )
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, top_k_weights, *stacks.values())
    )
    backend = BACKENDS["reference"]() if needs_gradient else select_backend(hidden_states.device)
    if kept is None:
        identity_VE = torch.arange(len(self.down_proj), dtype=torch.int32, device=hidden_states.device).unsqueeze(0)
        routing = backend.remap(top_k_index, top_k_weights, identity_VE)
    else:
        routing = backend.remap(top_k_index, top_k_weights, kept.table_VE, kept.survivors)
    return backend.moe_ffn(hidden_states, routing, experts)


def _stacks(module: Any) -> dict[str, str]:
    """Field of ExpertWeights -> the module's parameter for it."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    stacks = {"w_in_PGD": first, "w_out_PDF": "down_proj"}
    if module.has_bias:
        stacks |= {"b_in_PG": f"{first}_bias", "b_out_PD": "down_proj_bias"}
    return stacks


def _obstacle(module: Any) -> str | None:
    """Why the kernels cannot compute what the module does, or None if they can."""
    if module.is_transposed:
        return "its weights are stored transposed"
    if not module.is_concatenated:
        return "its gate and up rows are interleaved"
    if getattr(module, "has_post_expert_norm", False):  # unknown to 5.17
        return "it normalises each expert's output"
    # By the class: torch.compile does not see the name of a bound method.
    if module.has_gate and type(module)._apply_gate.__name__ != "_default_apply_gate":
        return "it has a gate of its own"
    if _activation_name(module.act_fn) not in ACTIVATIONS:
        return f"its activation is {_activation_name(module.act_fn)}, known are {sorted(set(ACTIVATIONS.values()))}"
    stacks = [getattr(module, name) for name in _stacks(module).values()]
    # A subclass means something else by its numbers: sharded (DTensor), quantised.
    plain = all(type(stack) in (nn.Parameter, torch.Tensor) and stack.dtype in DTYPES for stack in stacks)
    if not plain or any(stack.dtype != stacks[0].dtype for stack in stacks):
        kinds = sorted({f"{type(stack).__name__} of {stack.dtype}" for stack in stacks})
        return f"its weights are {', '.join(kinds)}, must be plain tensors of one of {', '.join(map(str, DTYPES))}"
    if not all(stack.is_contiguous() for stack in stacks):
        return "its weights are strided"
    return None


def _obstacle_to_dropping(module: Any) -> str | None:
    if _kept(module) is not None:
        return "experts were dropped from it before"
    if not module._parameters.keys() >= set(_stacks(module).values()):
        return "its weights are computed from others at each step"
    if module.down_proj.is_meta:
        return "its weights are not in memory"
    return None


def _activation_name(act_fn: Any) -> str:
    if isinstance(act_fn, nn.GELU):
        return f"GELU({act_fn.approximate})"
    return str(getattr(act_fn, "__name__", type(act_fn).__name__))


def _kept(module: Any) -> KeptExperts | None:
    return getattr(module, "secateur", None)


def _require_this_implementation(module: Any, args: object) -> None:
    """Any other implementation would take the router's numbers for rows of the stacks, which are fewer now."""
    chosen = module.config._experts_implementation
    if chosen != NAME:
        raise ValueError(
            f"experts were dropped from {type(module).__name__}, which {chosen!r} knows nothing of: call "
            f'register() and model.set_experts_implementation("{NAME}")'
        )


def _original_forward(cls: type[Any]) -> Any:
    """The forward that the class had before `transformers` wrapped it to look the implementation up."""
    forwards: list[Any] = [vars(base).get("forward") for base in cls.__mro__]
    return inspect.unwrap(next(forward for forward in forwards if hasattr(forward, "__wrapped__")))


@cache
def _log_fallback(class_name: str, obstacle: str) -> None:
    logger.warning("%s runs by its own forward, not by these kernels: %s", class_name, obstacle)

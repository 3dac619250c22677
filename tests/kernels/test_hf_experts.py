"""The experts of models of `transformers` through our kernels, whole and with experts dropped, against its own.

Legend: T tokens, K chosen experts per token, E experts that the router knows, D model width, F expert inner width,
G = 2F (F if not gated). All models are tiny, random and in float32 unless a test says otherwise.
"""

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from kernels import hf_experts, reference
from kernels.hf_experts import NAME, experts_forward, keep_experts, register
from kernels.moe import BACKENDS, select_backend

NUM_EXPERTS = 4
COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_nextn_predict_layers": 0,
}
# Softmax over the chosen; a shared expert; inner width of their own; no renormalisation; sigmoid, bias and groups.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 12, "head_dim": 6},
    "olmoe": {"num_experts": NUM_EXPERTS},
    "deepseek_v3": DEEPSEEK,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    hf_experts._log_fallback.cache_clear()


@pytest.fixture(params=sorted(BACKENDS))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the backend under test computes; the adapter is made to choose it."""
    name = request.param
    chosen = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(hf_experts, "select_backend", lambda device: select_backend(device, name))
    return chosen


def make_model(family: str, **options: Any) -> Any:
    """A causal model with eager experts, in eval mode. Biases and norms are random too, so that none can be lost."""
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **options})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def ours(model: Any) -> Any:
    """A copy that runs its experts through our kernels."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation(NAME)
    return twin


def experts_of(model: Any) -> list[Any]:
    """The experts modules, one for each layer that has any."""
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate")]


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids.to(model.device)).logits.cpu()
    return result


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Calls:
    """Counts the calls of a backend's layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(
            hf_experts, "select_backend", lambda device: SimpleNamespace(remap=reference.remap, moe_ffn=self.moe_ffn)
        )

    def moe_ffn(self, *args: Any) -> torch.Tensor:
        self.count += 1
        return reference.moe_ffn(*args)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_experts(family: str, device: torch.device) -> None:
    model, ids = make_model(family), tokens()
    assert_close(logits(ours(model).to(device), ids), logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_falls_back(family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls, model = Calls(monkeypatch), ours(make_model(family))
    logits(model, tokens())
    assert calls.count == len(experts_of(model)) > 0
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_experts(family: str) -> None:
    model, ids = make_model(family), tokens()
    gradients = []
    for twin in (ours(model), model):
        twin(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("experts" in name for name in gradients[0])
    assert any("gate.weight" in name for name in gradients[0])
    for name, expected in gradients[1].items():
        assert_close(gradients[0][name], expected)


@pytest.mark.parametrize("needs", ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj", "down_proj_bias"])
def test_whatever_needs_a_gradient_gets_one(needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, module = Calls(monkeypatch), toy(has_bias=True)
    module.requires_grad_(False)
    inputs = toy_inputs()
    needy = inputs.get(needs, getattr(module, needs, None))
    assert needy is not None
    needy.requires_grad_()
    module(**inputs).sum().backward()
    assert needy.grad is not None
    assert calls.count == 0
    with torch.no_grad():
        module(**inputs)
    assert calls.count == 1


# ---- modules that no model of the families above has -----------------------------------------------------------------


class Loop(nn.Module):
    """Experts as `transformers` writes them, with its two optional parts: a bias, and no gate."""

    def __init__(self, config: Any, has_gate: bool = True, has_bias: bool = False) -> None:
        super().__init__()
        self.num_experts = NUM_EXPERTS
        shape_in, shape_out = (NUM_EXPERTS, 24 if has_gate else 12, 16), (NUM_EXPERTS, 16, 12)
        self.first = "gate_up_proj" if has_gate else "up_proj"
        for name, shape in ((self.first, shape_in), ("down_proj", shape_out)):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.4))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(shape[:2])))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        me: Any = self
        out_TD = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                h = getattr(self, self.first)[expert] @ hidden_states[token]
                if me.has_bias:
                    h = h + getattr(self, f"{self.first}_bias")[expert]
                h = me._apply_gate(h) if me.has_gate else self.act_fn(h)
                y = me.down_proj[expert] @ h
                if me.has_bias:
                    y = y + me.down_proj_bias[expert]
                out_TD[token] += weight * y
        return out_TD


def toy(act: str = "silu", *, body: type[nn.Module] = Loop, implementation: str = NAME, **flags: bool) -> Any:
    """A module as a model would hold it, of a class of its own."""
    config = SimpleNamespace(hidden_act=act, _experts_implementation=implementation)
    parts = {name: flags[name] for name in ("has_gate", "has_bias") if name in flags}
    return use_experts_implementation(type("Toy", (body,), {}), **flags)(config, **parts)


def toy_inputs(num_tokens: int = 7) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(num_tokens, 16),
        "top_k_index": torch.stack([torch.randperm(NUM_EXPERTS)[:2] for _ in range(num_tokens)]),
        "top_k_weights": torch.rand(num_tokens, 2),
    }


def eager(module: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """By a toy's own forward, whatever its configuration says."""
    return Loop.forward(module, **inputs)


@pytest.mark.parametrize(
    ("act", "gated", "biased"),
    [("relu2", False, False), ("gelu", True, False), ("gelu_pytorch_tanh", True, True), ("relu", False, True)],
)
@torch.no_grad()
def test_biases_gates_and_activations_are_honoured(
    act: str, gated: bool, biased: bool, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    module, inputs = toy(act, has_gate=gated, has_bias=biased), toy_inputs()
    result = module.to(device)(**{name: tensor.to(device) for name, tensor in inputs.items()}).cpu()
    assert_close(result, eager(module.cpu(), **inputs))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_each_activation_is_the_one_it_is_taken_for() -> None:
    """Of all that a config of `transformers` can name, these are known, and they compute what ours do."""
    x = torch.linspace(-12, 12, 4801)
    known = set()
    for name in set(ACT2FN) - {"prelu", "xielu"}:  # which have parameters
        act_fn = ACT2FN[name]
        if (ours := hf_experts.ACTIVATIONS.get(hf_experts._activation_name(act_fn))) is not None:
            known.add(name)
            torch.testing.assert_close(reference.activate(x, ours), act_fn(x), rtol=1e-6, atol=1e-6)
    gelus = {"gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"}
    assert known == {"silu", "swish", "relu", "relu2"} | gelus
    for act_fn, ours in ((nn.GELU(), "gelu_erf"), (nn.GELU("tanh"), "gelu_tanh"), (nn.functional.silu, "silu")):
        assert hf_experts.ACTIVATIONS[hf_experts._activation_name(act_fn)] == ours


class OwnGate(Loop):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=1.0)) * up


def strided() -> Any:
    module = toy()
    module.down_proj.data = module.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    return module


class Wrapped(torch.Tensor):
    """As sharded and quantised weights are."""


def subclassed() -> Any:
    module = toy()
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().as_subclass(Wrapped))
    return module


# Flags that only describe the weights leave the toy's own forward as it is, so it can be compared with itself.
REFUSED: dict[str, Callable[[], Any]] = {
    "stored transposed": lambda: toy(is_transposed=True),
    "interleaved": lambda: toy(is_concatenated=False),
    "normalises each expert's output": lambda: toy(has_post_expert_norm=True),
    "a gate of its own": lambda: toy(body=OwnGate),
    "activation is FastGELUActivation": lambda: toy("gelu_fast"),
    "strided": strided,
    "Wrapped": subclassed,
}


@pytest.mark.parametrize("obstacle", REFUSED)
@torch.no_grad()
def test_what_the_kernels_cannot_compute_runs_as_before(obstacle: str, caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = REFUSED[obstacle](), toy_inputs()
    for _ in range(2):
        assert torch.equal(module(**inputs), eager(module, **inputs))
    (record,) = caplog.records
    assert record.name == "secateur.kernels"
    assert obstacle in record.message
    with pytest.raises(ValueError, match=f"cannot drop experts from Toy: .*{obstacle}"):
        keep_experts(module, [0])


@torch.no_grad()
def test_an_input_of_another_dtype_runs_as_before(caplog: pytest.LogCaptureFixture) -> None:
    """Under autocast, float32 weights meet bfloat16 inputs."""
    module, inputs = toy(), toy_inputs()
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(**inputs), eager(module, **inputs))
        assert "its weights are torch.float32, its input is torch.bfloat16" in caplog.text
        keep_experts(module, [0, 1])
        with pytest.raises(ValueError, match=r"cannot run Toy .*: its weights are torch.float32, its input"):
            module(**inputs)


def test_a_dtype_the_kernels_do_not_know_and_a_mix_of_two() -> None:
    module = toy(has_bias=True)
    module.down_proj_bias.data = module.down_proj_bias.data.half()
    for refused in (toy().double(), module):
        assert "must be plain tensors of one of" in str(hf_experts._obstacle(refused))


@torch.no_grad()
def test_a_class_whose_parent_is_registered_too_falls_back_without_end() -> None:
    parent = use_experts_implementation(type("Parent", (OwnGate,), {}))
    module = toy(body=parent)
    inputs = toy_inputs()
    assert torch.equal(module(**inputs), eager(module, **inputs))


def test_gpt_oss_runs_as_before_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Transposed, interleaved, and with a gate of its own; two layers, three forward passes."""
    options = {"num_local_experts": NUM_EXPERTS, "head_dim": 4, "layer_types": ["full_attention"] * 2}
    config = transformers.GptOssConfig(**COMMON, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    ids = tokens()
    expected, twin = logits(model, ids), ours(model)
    assert all(torch.equal(logits(twin, ids), expected) for _ in range(3))
    messages = [record.message for record in caplog.records if record.name == "secateur.kernels"]
    assert messages == [
        "GptOssExperts runs by its own forward, not by these kernels: its weights are stored transposed"
    ]


# ---- ids, dtypes, the registry -------------------------------------------------------------------------------------


@torch.no_grad()
def test_ids_that_name_no_expert_add_nothing(device: torch.device) -> None:
    """E is the mark of expert parallelism in 5.23, anything from E on in 5.17; the weights there may be anything."""
    module, inputs = toy(), toy_inputs(4)
    inputs["top_k_index"] = torch.tensor([[0, NUM_EXPERTS], [NUM_EXPERTS + 3, 2], [-1, 1], [NUM_EXPERTS, NUM_EXPERTS]])
    result = module.to(device)(**{name: tensor.to(device) for name, tensor in inputs.items()}).cpu()
    foreign = (inputs["top_k_index"] < 0) | (inputs["top_k_index"] >= NUM_EXPERTS)
    inputs["top_k_index"][foreign] = 0
    inputs["top_k_weights"][foreign] = 0.0
    assert_close(result, eager(module.cpu(), **inputs))
    assert bool((result[3] == 0).all())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])  # routing weights in float32, in the model's dtype
def test_bfloat16_models_stay_near_their_float32_twins(family: str) -> None:
    model, ids = make_model(family), tokens()
    model.bfloat16()
    expected = logits(copy.deepcopy(model).float(), ids)
    theirs, result = logits(model, ids), logits(ours(model), ids)
    assert result.dtype == torch.bfloat16
    assert float((result - expected).norm()) < 1.5 * float((theirs - expected).norm())


@pytest.mark.parametrize("dropped", [False, True])
@torch.no_grad()
def test_a_compiled_module_is_one_graph(dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer itself is one operator on a GPU; here something takes its place that every graph can hold."""

    def moe_ffn(x_TD: torch.Tensor, routing: Any, experts: Any) -> torch.Tensor:
        mix_T1 = (routing.weight_TK * (routing.slot_TK + 2)).sum(-1, keepdim=True)
        result: torch.Tensor = x_TD * mix_T1 @ experts.w_in_PGD[0].T
        return result

    backend = SimpleNamespace(remap=reference.remap, moe_ffn=moe_ffn)
    monkeypatch.setattr(hf_experts, "select_backend", lambda device: backend)
    module, inputs = toy(), toy_inputs()
    if dropped:
        keep_experts(module, [3, 1])
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(compiled(**inputs), module(**inputs))


def test_registering_again_changes_nothing() -> None:
    before = dict(ALL_EXPERTS_FUNCTIONS)
    register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    assert before[NAME] is experts_forward


@pytest.mark.parametrize("missing", ["transformers", "transformers.integrations.moe"])  # the latter: older than 5
def test_without_transformers_the_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers.integrations", "transformers.integrations.moe"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"install the extra `transformers`: pip install -e '\.\[transformers\]'"):
        register()


def test_a_checkpoint_loads_by_the_name_and_generates_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    generated = []
    for implementation in ("eager", NAME):
        calls = Calls(monkeypatch)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert model.get_experts_implementation()[""] == implementation
        torch.manual_seed(1)
        ids = tokens()
        generated.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False))
        assert calls.count == (6 * 2 if implementation == NAME else 0)
    assert torch.equal(generated[0], generated[1])


# ---- with experts dropped ------------------------------------------------------------------------------------------


def drop(model: Any, keep: list[int], **arguments: Any) -> Any:
    """A copy that runs through our kernels on the experts kept, in all its layers."""
    twin = ours(model)
    for experts in experts_of(twin):
        keep_experts(experts, keep, **arguments)
    return twin


def rewrite(model: Any, change: Callable[[Any], None]) -> Any:
    """A copy with eager experts whose weights were changed by hand."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for experts in experts_of(twin):
            change(experts)
    return twin


def silence(experts: Any) -> None:
    experts.down_proj[[0, 2]] = 0.0


def tie(experts: Any) -> None:
    for dropped, kept in ((0, 3), (2, 1)):
        experts.gate_up_proj[dropped] = experts.gate_up_proj[kept]
        experts.down_proj[dropped] = experts.down_proj[kept]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("change", "instead"), [(silence, {}), (tie, {0: 3, 2: 1})])
def test_dropped_experts_are_silent_or_tied(
    family: str, change: Callable[[Any], None], instead: dict[int, int], device: torch.device
) -> None:
    """Kept in another order than they had, so that slots differ from ids."""
    model, ids = make_model(family), tokens()
    pruned = drop(model, [3, 1], instead=instead)
    expected = logits(rewrite(model, change), ids)
    assert float((expected - logits(model, ids)).norm()) > 0.01 * float(expected.norm())
    assert_close(logits(pruned.to(device), ids), expected)


@torch.no_grad()
def test_a_constant_is_added_with_the_weight_of_the_expert_it_replaces(device: torch.device) -> None:
    module, inputs = toy(), toy_inputs()
    inputs["top_k_index"] = torch.tensor([[0, 1], [2, 1], [1, 0], [3, 2], [0, 2], [1, 3], [2, 0]])
    constants = torch.randn(2, 16)
    expected = eager(rewrite(toy_model(module), silence)[0], **inputs)
    for token in range(7):
        for choice in range(2):
            expert = int(inputs["top_k_index"][token, choice])
            if expert in (0, 2):
                expected[token] += inputs["top_k_weights"][token, choice] * constants[expert // 2]
    keep_experts(module, [1, 3], instead={2: constants[1], 0: constants[0]})
    result = module.to(device)(**{name: tensor.to(device) for name, tensor in inputs.items()})
    assert_close(result.cpu(), expected)


def toy_model(module: Any) -> nn.ModuleList:
    return nn.ModuleList([module])


@torch.no_grad()
@pytest.mark.parametrize(("survivors", "factor"), [("keep", 1.0), ("old_sum", 4 / 3), ("one", 5 / 3)])
def test_survivors_make_up_for_what_adds_nothing(survivors: Any, factor: float) -> None:
    """Weights .6 and .2: the survivor's .6 stays, becomes .8, or 1."""
    module, inputs = toy(), toy_inputs(1)
    inputs["top_k_index"], inputs["top_k_weights"] = torch.tensor([[1, 2]]), torch.tensor([[0.6, 0.2]])
    expected = eager(rewrite(toy_model(module), silence)[0], **inputs)
    keep_experts(module, [1, 3], survivors=survivors)
    assert_close(module(**inputs), factor * expected)


def test_what_is_left_can_be_trained() -> None:
    """The router learns as if the dropped experts' outputs were zero; the experts kept learn as before."""
    model, ids = make_model("qwen3_moe"), tokens()
    pruned, silenced = drop(model, [1, 3]), rewrite(model, silence)
    for twin in (pruned, silenced):
        twin(ids, labels=ids).loss.backward()
    for kept, whole in zip(experts_of(pruned), experts_of(silenced), strict=True):
        assert_close(kept.gate_up_proj.grad, whole.gate_up_proj.grad[[1, 3]])
        assert_close(kept.down_proj.grad, whole.down_proj.grad[[1, 3]])
    for kept, whole in zip(pruned.model.layers, silenced.model.layers, strict=True):
        assert_close(kept.mlp.gate.weight.grad, whole.mlp.gate.weight.grad)


@torch.no_grad()
def test_only_the_weights_kept_remain_in_the_same_parameters() -> None:
    module = toy(has_bias=True)
    before = dict(module.named_parameters())
    expected = {name: parameter[[2, 0]].clone() for name, parameter in before.items()}
    keep_experts(module, [2, 0], instead={1: torch.ones(16)})
    assert dict(module.named_parameters()).keys() == before.keys()
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, expected[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert module.secateur.table_VE.tolist() == [[1, -2, 0, -1]]
    assert module.secateur.kept_share == 0.5


@torch.no_grad()
def test_a_pruned_module_moves_copies_and_saves_as_one_thing() -> None:
    module, inputs = toy(), toy_inputs()
    keep_experts(module, [1, 3], instead={0: torch.randn(16)})
    expected = module(**inputs)
    assert torch.equal(copy.deepcopy(module)(**inputs), expected)
    other = toy()
    keep_experts(other, [0, 1], instead={2: torch.zeros(16)})
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(**inputs), expected)
    module.bfloat16()
    assert module.secateur.table_VE.dtype == torch.int32
    assert module.secateur.const_CD.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"secateur\.table_VE"):
        toy().load_state_dict(module.state_dict())


@pytest.mark.parametrize("other", ["eager", "grouped_mm", "batched_mm"])
def test_a_pruned_model_refuses_other_implementations(other: str) -> None:
    """They would run the wrong experts, or read past the stacks."""
    pruned = drop(make_model("mixtral"), [1, 3])
    pruned.set_experts_implementation(other)
    with pytest.raises(
        ValueError, match=rf"experts were dropped from MixtralExperts, which '{other}' knows nothing of"
    ):
        pruned(tokens())


@pytest.mark.parametrize(
    ("keep", "instead", "message"),
    [
        ([], {}, r"keep is \[\], must be one or more different experts of 0 \.\. 3"),
        ([1, 1], {}, r"keep is \[1, 1\]"),
        ([0, 4], {}, r"keep is \[0, 4\]"),
        ([-1], {}, r"keep is \[-1\]"),
        ([0, 1, 2, 4], {}, r"keep is \[0, 1, 2, 4\]"),
        ([0], {0: 0}, r"instead has entries for \[0\], must be for dropped experts only"),
        ([0], {4: 0}, r"instead has entries for \[4\]"),
        ([0], {1: 2}, r"instead\[1\] is 2, must be a kept expert or a vector"),
        ([0], {1: torch.zeros(3)}, r"instead\[1\] has the shape \(3,\), must be \(16,\)"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    keep: list[int], instead: dict[int, int | torch.Tensor], message: str
) -> None:
    module = toy()
    with pytest.raises(ValueError, match=message):
        keep_experts(module, keep, instead)
    assert module.down_proj.shape[0] == NUM_EXPERTS


def test_experts_are_dropped_once_and_only_from_weights_at_hand() -> None:
    module = toy()
    keep_experts(module, [0, 1])
    computed = toy()
    nn.utils.parametrize.register_parametrization(computed, "down_proj", nn.Identity())
    for refused, obstacle in ((module, "dropped from it before"), (computed, "computed"), (toy().to("meta"), "memory")):
        with pytest.raises(ValueError, match=obstacle):
            keep_experts(refused, [0])

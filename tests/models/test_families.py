"""Each family against `transformers` on the same tiny random checkpoint: the oracle of the whole forward pass."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import Classifier
from models.config import LayerShape, ModelConfig
from models.decoder import MoEClassifier
from models.families import FAMILIES
from models.hf_config import parse_config, read_json
from models.packed import PackedBatch
from models.weights import load_weights, weight_files

# V-MoE has no twin in transformers; its oracle is tests/models/test_vision.py.
TWINS = [name for name, family in FAMILIES.items() if not family.reads_images]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, gates renormalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe, a dense layer by list": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "qwen3_moe, dense layers by step": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe, one choice": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "qwen3_moe, every expert chosen": ("qwen3_moe", {"num_experts_per_tok": 4}),
    "qwen3_moe, one key head": ("qwen3_moe", {"num_key_value_heads": 1}),
    "qwen3_moe, another rope base": ("qwen3_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen2_moe, gates renormalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen2_moe, a dense layer": ("qwen2_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
    "olmoe, gates renormalised": ("olmoe", {"norm_topk_prob": True}),
    "olmoe, no grouped queries": ("olmoe", {"num_key_value_heads": 4}),
    "mixtral": ("mixtral", {}),
    "mixtral, a sliding window wider than the texts": ("mixtral", {"sliding_window": 40}),
}


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def outputs(model: Classifier, batch: list[list[int]]) -> torch.Tensor:
    return model.classify(batch).logits_BC


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(
    variant: str,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    oracle_logits: Callable[..., torch.Tensor],
    sequences: list[list[int]],
    poison: None,
) -> None:
    family, options = VARIANTS[variant]
    oracle = make_oracle(family, **options)
    expected = oracle_logits(oracle, sequences)
    assert float(expected.std()) > 0.1, "the oracle's logits are too alike to show anything"
    model = load_checkpoint(write_oracle(oracle, tmp_path / "checkpoint")).model
    assert relative(outputs(model, sequences), expected) < 1e-5
    alone = torch.cat([outputs(model, [sequence]) for sequence in sequences])
    assert relative(alone, expected) < 1e-5
    assert relative(outputs(model, sequences[::-1]), expected.flip(0)) < 1e-5


@pytest.mark.parametrize("family", TWINS)
def test_the_sharded_form_loads_as_the_single_file(
    family: str,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    sequences: list[list[int]],
) -> None:
    oracle = make_oracle(family)
    single = load_checkpoint(write_oracle(oracle, tmp_path / "single"))
    sharded_dir = write_oracle(oracle, tmp_path / "sharded", max_shard_size="8KB")
    assert len(weight_files(sharded_dir)) > 1
    assert torch.equal(outputs(load_checkpoint(sharded_dir).model, sequences), outputs(single.model, sequences))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_backend_gives_the_same(
    backend: str,
    pristine: Path,
    sequences: list[list[int]],
    make_oracle: Callable[..., Any],
    oracle_logits: Callable[..., torch.Tensor],
) -> None:
    expected = oracle_logits(make_oracle("qwen3_moe"), sequences)
    assert relative(outputs(load_checkpoint(pristine, backend=backend).model, sequences), expected) < 1e-5


def oracle_hidden(oracle: Any, sequence: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = oracle.model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("family", TWINS)
def test_pooling_against_hidden_states_of_transformers(
    family: str,
    pooling: str,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    edit_json: Callable[..., None],
    sequences: list[list[int]],
) -> None:
    oracle = make_oracle(family)
    path = write_oracle(oracle, tmp_path / "checkpoint")
    edit_json(path / "config.json", classifier_pooling=pooling)
    with torch.inference_mode():
        hidden = [oracle_hidden(oracle, s) for s in sequences]
        pooled = [{"mean": x_LD.mean(0), "first": x_LD[0], "last": x_LD[-1]}[pooling] for x_LD in hidden]
        expected = oracle.score(torch.stack(pooled))
    assert relative(outputs(load_checkpoint(path).model, sequences), expected) < 1e-5


def test_hidden_states_of_every_token(
    tmp_path: Path, make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], sequences: list[list[int]]
) -> None:
    oracle = make_oracle("qwen3_moe")
    model = load_checkpoint(write_oracle(oracle, tmp_path / "checkpoint")).model
    with torch.inference_mode():
        hidden_TD = model.hidden(PackedBatch.pack(sequences))
    assert relative(hidden_TD, torch.cat([oracle_hidden(oracle, s) for s in sequences])) < 1e-5


def pruned_model(path: Path, layers: tuple[LayerShape, ...], kept: list[int]) -> MoEClassifier:
    """The model in `path` with only the kept experts in each layer, and the given shapes."""
    full = load_checkpoint(path).model
    config = ModelConfig(**{**full.config.__dict__, "layers": layers})
    model = MoEClassifier(config)
    whole = dict(full.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = kept if parameter.shape != whole[name].shape else slice(None)
            parameter.copy_(whole[name][rows])
    return model.requires_grad_(False)


KEPT = [0, 2, 3]


@pytest.mark.parametrize("family", TWINS)
@pytest.mark.parametrize("normalize", [False, True])
def test_slice_is_the_router_of_transformers_masked_to_minus_infinity(
    family: str,
    normalize: bool,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    oracle_logits: Callable[..., torch.Tensor],
    sequences: list[list[int]],
) -> None:
    oracle = make_oracle(family, **({} if family == "mixtral" else {"norm_topk_prob": normalize}))
    path = write_oracle(oracle, tmp_path / "checkpoint")

    def mask_expert_1(module: Any, args: tuple[torch.Tensor], output: Any) -> Any:
        logits_TE = torch.nn.functional.linear(args[0].reshape(-1, 16), module.weight)
        logits_TE[:, 1] = -torch.inf
        probability_TK, expert_TK = torch.softmax(logits_TE, dim=-1).topk(2)
        if normalize or family == "mixtral":
            probability_TK = probability_TK / probability_TK.sum(-1, keepdim=True)
        return logits_TE, probability_TK, expert_TK

    for layer in oracle.model.layers:
        layer.mlp.gate.register_forward_hook(mask_expert_1)
    expected = oracle_logits(oracle, sequences)

    model = pruned_model(path, (LayerShape.unpruned(3),) * 2, KEPT)
    assert relative(outputs(model, sequences), expected) < 1e-5


@pytest.mark.parametrize("family", TWINS)
def test_zero_is_transformers_with_that_experts_output_forced_to_zero(
    family: str,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    oracle_logits: Callable[..., torch.Tensor],
    sequences: list[list[int]],
) -> None:
    oracle = make_oracle(family)
    path = write_oracle(oracle, tmp_path / "checkpoint")
    with torch.no_grad():
        for layer in oracle.model.layers:
            layer.mlp.experts.down_proj[1] = 0.0
    expected = oracle_logits(oracle, sequences)

    model = pruned_model(path, (LayerShape(3, (0, -1, 1, 2)),) * 2, KEPT)
    output = model.classify(sequences)
    assert relative(output.logits_BC, expected) < 1e-5
    assert 0 < output.dropped_slots < output.routed_slots


@pytest.mark.parametrize("family", TWINS)
def test_what_we_write_transformers_reads(
    family: str,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    oracle_class: Callable[[str], Any],
    oracle_logits: Callable[..., torch.Tensor],
    sequences: list[list[int]],
) -> None:
    path = write_oracle(make_oracle(family), tmp_path / "theirs")
    theirs = load_checkpoint(path)
    ours = save_checkpoint(tmp_path / "ours", theirs.model, theirs.raw_config, path / "tokenizer.json")
    reread = oracle_class(family).from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert relative(oracle_logits(reread, sequences), outputs(ours.model, sequences)) < 1e-5


def test_families_are_tables_without_control_flow() -> None:
    folder = Path(__file__).parents[2] / "models" / "families"
    branching = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.Lambda, ast.Match)
    for name in FAMILIES:
        nodes = ast.walk(ast.parse((folder / f"{name}.py").read_text()))
        assert not [node for node in nodes if isinstance(node, branching)], name
    assert all(name == family.name for name, family in FAMILIES.items())


def test_weights_are_filled_completely(pristine: Path, poison: None) -> None:
    """Every parameter is created as NaN here; none may stay so."""
    model = MoEClassifier(parse_config(read_json(pristine / "config.json")))
    assert all(torch.isnan(p).all() for p in model.parameters())
    load_weights(model, weight_files(pristine))
    assert all(torch.isfinite(p).all() for p in model.parameters())

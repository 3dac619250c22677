"""config.json: what is read, what is refused and how the refusal reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.config import LayerShape, ModelConfig
from models.errors import CheckpointError
from models.hf_config import (
    is_hugging_face,
    parse_config,
    parse_labels,
    parse_problem_type,
    read_json,
    write_config,
)


@pytest.fixture
def raw(pristine: Path) -> dict[str, Any]:
    """Newer writers call the number of experts num_local_experts; both names are read, here the older one stands."""
    value = read_json(pristine / "config.json")
    count = value.pop("num_local_experts", value.get("num_experts"))
    return {**value, "num_experts": count}


def test_layer_shapes_count_rows_experts_and_constants() -> None:
    shape = LayerShape(2, (0, -1, -3, 1, -2))
    assert (shape.num_rows, shape.num_experts, shape.num_constants) == (5, 2, 2)
    assert LayerShape.unpruned(3) == LayerShape(3, (0, 1, 2))
    assert LayerShape(0, ()).num_constants == 0


def test_both_names_of_the_expert_count_are_read_and_written(raw: dict[str, Any]) -> None:
    renamed = {**raw, "num_local_experts": raw["num_experts"]}
    del renamed["num_experts"]
    assert parse_config(renamed) == parse_config(raw)
    config = pruned(parse_config(renamed), LayerShape.unpruned(3), LayerShape.unpruned(3))
    assert write_config(renamed, config, "float32")["num_local_experts"] == 3


def test_dense_layers_come_from_the_list_and_the_step(raw: dict[str, Any]) -> None:
    raw |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = parse_config(raw)
    assert config.moe_layers == (1, 5)
    assert [layer.num_experts for layer in config.layers] == [0, 4, 0, 0, 0, 4]


@pytest.mark.parametrize(
    ("changes", "max_tokens"),
    [
        ({}, 48),
        ({"sliding_window": 16, "use_sliding_window": True}, 16),
        ({"sliding_window": 16, "use_sliding_window": False}, 48),
        ({"sliding_window": 4096, "use_sliding_window": True}, 48),
        ({"sliding_window": None}, 48),
    ],
)
def test_the_longest_input_fits_positions_and_window(
    raw: dict[str, Any], changes: dict[str, Any], max_tokens: int
) -> None:
    assert parse_config(raw | changes).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', must be one of mixtral, olmoe, qwen2_moe, qwen3_moe"),
        ({"model_type": ["qwen3_moe"]}, "model_type is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', only 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True, only False is supported"),
        ({"hidden_size": 0}, "hidden_size is 0, must be a positive integer"),
        ({"hidden_size": "16"}, "hidden_size is '16', must be a positive integer"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok is True, must be a positive integer"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"num_experts_per_tok": 5}, "layer 0 routes over 4 experts, fewer than num_experts_per_tok=5"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max', must be one of last, mean, first"),
    ],
)
def test_what_we_would_not_run_faithfully_is_refused(
    raw: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(raw | changes)


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "num_experts", "moe_intermediate_size"])
def test_a_missing_size_is_named(raw: dict[str, Any], key: str) -> None:
    del raw[key]
    with pytest.raises(CheckpointError, match=f"{key}.* is None, must be a positive integer"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        (None, "id2label is missing"),
        ({}, "id2label is missing"),
        ({"0": "ham", "2": "spam"}, r"id2label is incomplete: ids are \[0, 2\], must be 0..1"),
        ({"1": "ham", "2": "spam"}, "id2label is incomplete"),
        ({"0": "ham", "1": "ham"}, "id2label gives two classes the same name"),
        ({"a": "ham"}, "id2label keys must be integers"),
    ],
)
def test_labels_must_be_complete_and_distinct(id2label: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_labels({"id2label": id2label})


def test_labels_are_ordered_by_id_not_by_position() -> None:
    assert parse_labels({"id2label": {"10": "k", **{str(i): str(i) for i in range(10)}}})[-1] == "k"


def test_problem_type_defaults_as_upstream() -> None:
    assert parse_problem_type({"id2label": {"0": "yes"}}) == "multi_label_classification"
    assert parse_problem_type({"id2label": {"0": "a", "1": "b"}}) == "single_label_classification"
    assert parse_problem_type({"problem_type": "regression"}) == "regression"
    with pytest.raises(CheckpointError, match="problem_type is 'ranking', must be one of"):
        parse_problem_type({"problem_type": "ranking"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[1, 2]", "config.json must hold a JSON object, found list"),
        (b"[" * 100_000, "config.json is not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_a_missing_or_enormous_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_json(tmp_path / "config.json")
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(CheckpointError, match=r"config.json is larger than"):
        read_json(tmp_path / "config.json")


def pruned(config: ModelConfig, *layers: LayerShape) -> ModelConfig:
    return ModelConfig(**{**vars(config), "layers": layers})


def test_a_uniform_slice_stays_a_hugging_face_config(raw: dict[str, Any]) -> None:
    config = pruned(parse_config(raw), LayerShape.unpruned(3), LayerShape.unpruned(3))
    written = write_config(raw, config, "bfloat16")
    assert (written["model_type"], written["num_experts"], written["dtype"]) == ("qwen3_moe", 3, "bfloat16")
    assert parse_config(written).layers == config.layers
    assert raw["num_experts"] == 4, "the parent's config was changed"


@pytest.mark.parametrize(
    "layers",
    [
        (LayerShape.unpruned(3), LayerShape.unpruned(2)),
        (LayerShape(3, (0, -1, 1, 2)), LayerShape(3, (0, -1, 1, 2))),
        (LayerShape(2, (0, 1, 1)), LayerShape(2, (0, 1, 1))),
    ],
    ids=["counts differ", "rows without experts", "tied"],
)
def test_what_transformers_cannot_hold_is_marked_as_ours(raw: dict[str, Any], layers: tuple[LayerShape, ...]) -> None:
    config = pruned(parse_config(raw), *layers)
    assert not is_hugging_face(config)
    written = write_config(raw, config, "float32")
    assert written["model_type"] == "secateur"
    assert parse_config(json.loads(json.dumps(written)), layers) == config


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_head_that_does_not_read_the_last_token_is_marked_as_ours(raw: dict[str, Any], pooling: str) -> None:
    raw["classifier_pooling"] = pooling
    config = parse_config(raw)
    written = write_config(raw, config, "float32")
    assert written["model_type"] == "secateur"
    assert parse_config(written) == config


def test_layers_of_a_manifest_must_match_the_depth(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"secateur.json lists 3 layers, config.json has 2"):
        parse_config(raw, (LayerShape.unpruned(4),) * 3)


def test_our_own_type_needs_a_known_family(checkpoint_dir: Path, edit_json: Callable[..., None]) -> None:
    edit_json(checkpoint_dir / "config.json", model_type="secateur", secateur_family="gpt")
    with pytest.raises(CheckpointError, match="model_type is 'gpt', must be one of"):
        parse_config(read_json(checkpoint_dir / "config.json"))

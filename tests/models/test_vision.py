"""V-MoE against an implementation written from the equations of the paper: one token at a time, in float64.

x_0 = [class; E patch_1; ..] + positions, x' = x + MSA(LN(x)), x = x' + MLP or MoE(LN(x')), logits = head(LN(x_L)),
MoE(x) = sum over chosen e of softmax(W x)_e MLP_e(x): arXiv 2106.05974, section 2; 2202.09368 where experts choose.
"""

import json
from dataclasses import replace
from math import erf, exp, pi, sqrt, tanh
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.architecture import build
from models.checkpoint import load_checkpoint
from models.config import LayerShape
from models.errors import CheckpointError, PlanError
from models.hf_config import parse_config
from models.images import ImageEncoder
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan, keep_best, merge_groups
from models.vision import VisionMoEClassifier, expert_choice
from models.vmoe_npz import import_vmoe
from tests.models.tiny_vision import CONFIG, VARIANTS, images, save_vision, tiny_vision

Vector = npt.NDArray[np.float64]


class Paper:
    """The oracle. route_E and const_CD of a layer say what cut experts mean; without them none is cut."""

    def __init__(self, model: VisionMoEClassifier) -> None:
        self.config = model.config
        self.p = {name: value.double().numpy() for name, value in model.named_parameters()}

    def logits(self, pixels_HWc: npt.NDArray[np.uint8]) -> Vector:
        v, c = self.config.vision, self.config
        assert v is not None
        tokens = []
        for top in range(0, v.height, v.patch):
            for left in range(0, v.width, v.patch):
                token = self.p["b_patch_D"].copy()
                for row in range(v.patch):
                    for column in range(v.patch):
                        for channel in range(v.channels):
                            value = pixels_HWc[top + row, left + column, channel] / 255
                            value = (value - v.mean[channel]) / v.std[channel]
                            token += self.p["w_patch"][:, channel, row, column] * value
                tokens.append(token)
        if c.pooling == "first":
            tokens.insert(0, self.p["class_1D"][0].copy())
        tokens = [token + position for token, position in zip(tokens, self.p["position_LD"], strict=True)]
        for layer in range(c.num_layers):
            tokens = self.block(tokens, layer)
        tokens = [self.norm(token, "norm_D", "b_norm_D") for token in tokens]
        pooled = tokens[0] if c.pooling == "first" else sum(tokens) / len(tokens)
        return np.asarray(self.p["score_CD"] @ pooled + self.p["b_score_C"])

    def block(self, tokens: list[Vector], layer: int) -> list[Vector]:
        mixed = self.attention([self.norm_of(token, layer, "attention_norm_D") for token in tokens], layer)
        tokens = [token + change for token, change in zip(tokens, mixed, strict=True)]
        normed = [self.norm_of(token, layer, "ffn_norm_D") for token in tokens]
        if not self.config.layers[layer].num_experts:
            changes = [self.mlp(x, *(self.at(layer, n) for n in DENSE)) for x in normed]
        else:
            changes = self.moe(normed, layer)
        return [token + change for token, change in zip(tokens, changes, strict=True)]

    def attention(self, tokens: list[Vector], layer: int) -> list[Vector]:
        width, head = self.config.width, self.config.head_dim
        qkv = [self.at(layer, "w_qkv") @ token + self.at(layer, "b_qkv") for token in tokens]
        out = []
        for mine in qkv:
            heads = []
            for start in range(0, width, head):
                q = mine[start : start + head]
                keys = [other[width + start : width + start + head] for other in qkv]
                values = [other[2 * width + start : 2 * width + start + head] for other in qkv]
                weights = softmax(np.array([q @ key / sqrt(head) for key in keys]))
                heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            out.append(self.at(layer, "w_o") @ np.concatenate(heads) + self.at(layer, "b_o"))
        return out

    def moe(self, tokens: list[Vector], layer: int) -> list[Vector]:
        v, shape = self.config.vision, self.config.layers[layer]
        assert v is not None
        gates = [softmax(self.at(layer, "w_router_ED") @ token) for token in tokens]
        if v.capacity:
            chosen: list[list[int]] = [[] for _ in tokens]
            for expert in range(shape.num_rows):
                best = sorted(range(len(tokens)), key=lambda t: (-gates[t][expert], t))
                for t in best[: v.capacity]:
                    chosen[t].append(expert)
        else:
            chosen = [np.argsort(-gate, kind="stable")[: self.config.top_k].tolist() for gate in gates]
        out = []
        for token, gate, experts in zip(tokens, gates, chosen, strict=True):
            total = np.zeros_like(token)
            for row in experts:
                slot = shape.route_E[row]
                if slot >= 0:
                    weights = (self.at(layer, name)[slot] for name in EXPERT)
                    total += gate[row] * self.mlp(token, *weights)
                elif slot < -1:
                    total += gate[row] * self.at(layer, "const_CD")[-2 - slot]
            out.append(total)
        return out

    def mlp(self, x: Vector, w_in: Vector, b_in: Vector, w_out: Vector, b_out: Vector) -> Vector:
        hidden = w_in @ x + b_in
        # flax's gelu: the tanh approximation.
        hidden = np.array([0.5 * h * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 * h**3))) for h in hidden])
        return np.asarray(w_out @ hidden + b_out)

    def norm(self, x: Vector, weight: str, bias: str) -> Vector:
        scaled = (x - x.mean()) / sqrt(((x - x.mean()) ** 2).mean() + self.config.norm_eps)
        return np.asarray(scaled * self.p[weight] + self.p[bias])

    def norm_of(self, x: Vector, layer: int, name: str) -> Vector:
        return self.norm(x, f"layers.{layer}.{name}", f"layers.{layer}.b_{name}")

    def at(self, layer: int, name: str) -> Vector:
        return np.asarray(self.p[f"layers.{layer}.{name}"])


DENSE = ("w_dense_in", "b_dense_in", "w_dense_out", "b_dense_out")
EXPERT = ("w_in_PGD", "b_in_PG", "w_out_PDF", "b_out_PD")


def softmax(x: Vector) -> Vector:
    odds = np.array([exp(value - x.max()) for value in x])
    return np.asarray(odds / odds.sum())


def answers(model: VisionMoEClassifier, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    vision = model.config.vision
    assert vision is not None
    encoder = ImageEncoder(vision, model.config.max_tokens)
    logits_BC = model.classify([encoder.encode(picture).ids for picture in pictures]).logits_BC
    return np.asarray(logits_BC.double().numpy())


def close(model: VisionMoEClassifier, pictures: npt.NDArray[np.uint8]) -> None:
    paper = Paper(model)
    wanted = np.stack([paper.logits(picture) for picture in pictures])
    got = answers(model, pictures)
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_are_those_of_the_equations(name: str, backend: str) -> None:
    model = tiny_vision(**VARIANTS[name])
    again = VisionMoEClassifier(model.config, backend=backend).requires_grad_(False)
    again.load_state_dict(model.state_dict())
    close(again, images(5))


def test_colours_and_rectangles() -> None:
    changes: dict[str, Any] = {
        "num_channels": 3,
        "image_mean": [0.2, 0.4, 0.6],
        "image_std": [0.3, 0.2, 0.5],
        "image_size": [8, 12],
    }
    model = tiny_vision(**changes)
    pictures = np.random.default_rng(3).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    close(model, pictures)


def plans(semantics: str) -> dict[int, LayerPlan]:
    if semantics == "tie":
        return {
            0: merge_groups([0, 1, 0, 2], [1.0, 1.0, 3.0, 1.0], "tie"),
            2: merge_groups([0, 0, 1, 1], [1] * 4, "tie"),
        }
    kept = {0: keep_best([1.0, 4.0, 3.0, 2.0], 2, "slice"), 2: keep_best([4.0, 1.0, 2.0, 3.0], 3, "slice")}
    const_ED = np.random.default_rng(5).normal(size=(4, CONFIG["hidden_size"])).astype(np.float32)
    return {
        layer: replace(plan, semantics=semantics, const_ED=const_ED if semantics == "constant" else None)  # type: ignore[arg-type]
        for layer, plan in kept.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("semantics", ["slice", "zero", "constant", "tie"])
def test_pruned_models_are_those_of_the_equations(name: str, semantics: str) -> None:
    parent = tiny_vision(**VARIANTS[name])
    if semantics == "slice" and "expert" in name:
        with pytest.raises(PlanError, match="would change every gate: use zero"):
            apply(parent, plans(semantics))
        return
    child = apply(parent, plans(semantics))
    assert isinstance(child, VisionMoEClassifier)
    assert [layer.num_experts for layer in child.config.layers] == [
        3 if semantics == "tie" else 2,
        0,
        2 if semantics == "tie" else 3,
    ]
    close(child, images(3))
    if semantics == "zero":  # the kept experts' own weights and biases, bit for bit
        for name in ("w_in_PGD", "b_in_PG", "w_out_PDF", "b_out_PD"):
            before, after = (model.get_parameter(f"layers.0.{name}") for model in (parent, child))
            assert torch.equal(after, before[[1, 2]])


def test_a_permuted_twin_merges_into_itself_bias_and_all() -> None:
    """Expert 1 is made expert 0 with its neurons in another order: aligned, their mean is expert 0 again."""
    model = tiny_vision()
    order_F = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("w_in_PGD", "b_in_PG", "b_out_PD"):
            tensor = model.get_parameter(f"layers.0.{name}")
            tensor[1] = tensor[0] if name == "b_out_PD" else tensor[0][order_F]
        w_out_PDF = model.get_parameter("layers.0.w_out_PDF")
        w_out_PDF[1] = w_out_PDF[0][:, order_F]
    child = apply(model, {0: merge_groups([0, 0, 1, 2], [1.0, 3.0, 1.0, 1.0], "tie", align=True)})
    assert isinstance(child, VisionMoEClassifier)
    np.testing.assert_allclose(answers(child, images(4)), answers(model, images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = tiny_vision(**VARIANTS[name])
    pictures = images(7)
    together = answers(model, pictures)
    alone = np.concatenate([answers(model, pictures[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answers(model, pictures[::-1]), together[::-1], rtol=1e-5, atol=1e-6)


def test_experts_choose_within_one_image() -> None:
    """Two images of two tokens, capacity 1: each expert takes the token with its greater gate; ties the earlier."""
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.5, 0.5]])
    row_TE, gate_TE = expert_choice(p.log(), length=2, capacity=1)
    assert row_TE.tolist() == [[0, -1], [-1, 1], [0, 1], [-1, -1]]
    torch.testing.assert_close(gate_TE, p)


def test_pairs_are_counted_as_routed() -> None:
    """Four images, two layers with experts. By token: 5 + 1 tokens (the last layer runs the class token only) by two.

    By expert: 4 experts take 2 tokens each, in each of two layers.
    """
    pictures = images(4)
    for name, per_image in (("token", (5 + 1) * 2), ("mean", (4 + 4) * 2), ("expert-choice", 2 * 4 * 2)):
        model = tiny_vision(**VARIANTS[name])
        vision = model.config.vision
        assert vision is not None
        encoder = ImageEncoder(vision, model.config.max_tokens)
        items = [encoder.encode(picture).ids for picture in pictures]
        assert model.classify(items).routed_slots == 4 * per_image
        assert model.classify(items).dropped_slots == 0
        child = apply(model, plans("zero"))
        output = child.classify(items)
        assert output.routed_slots == 4 * per_image
        if name == "expert-choice":  # two of four experts gone in layer 0, one in layer 2, each with 2 tokens
            assert output.dropped_slots == 4 * (2 * 2 + 1 * 2)


def test_gelu_is_the_tanh_form() -> None:
    """The exact form differs by more than the oracle's bound, so that the two cannot be confused."""
    assert abs(0.5 * (1 + erf(1 / sqrt(2))) - 0.5 * (1 + tanh(sqrt(2 / pi) * 1.044715))) > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_comes_back_and_is_held_to_its_golden_images(name: str, tmp_path: Path) -> None:
    model = tiny_vision(**VARIANTS[name])
    saved = save_vision(tmp_path / "pets", model, **VARIANTS[name])
    assert sorted(path.name for path in saved.path.iterdir()) == ["config.json", "model.safetensors", "secateur.json"]
    raw = json.loads((saved.path / "config.json").read_text())
    assert (raw["model_type"], raw["secateur_family"]) == ("secateur", "vmoe")
    np.testing.assert_allclose(answers(saved.model, images(3)), answers(model, images(3)), rtol=1e-6)  # type: ignore[arg-type]
    assert saved.manifest is not None
    assert [golden.image for golden in saved.manifest.golden] == ["ramp", "checks", "rings"]
    saved.verify()
    with torch.no_grad():
        saved.model.get_parameter("b_patch_D")[0] += 0.5
    with pytest.raises(CheckpointError, match="golden input 0"):
        saved.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image_size is 9, must be a multiple of patch_size"),
        ({"image_size": None}, "image_size is None"),
        ({"num_channels": 2}, "num_channels is 2, must be 1"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*, must be a number for each channel"),
        ({"image_std": [0.0]}, "image_std is .*, must be above 0"),
        ({"expert_capacity": 6}, "expert_capacity is 6, an image has only 5 tokens"),
        ({"expert_capacity": -1}, "expert_capacity is -1"),
        ({"moe_layers": [3]}, "moe_layers is .*, must list layers"),
        ({"moe_layers": []}, "moe_layers"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'gelu_pytorch_tanh'"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"classifier_pooling": "last"}, "classifier_pooling is 'last', must be one of first, mean"),
        ({"patch_size": 0}, "patch_size is 0, must be a positive integer"),
        ({"num_experts_per_tok": 5}, "routes over 4 experts, fewer than num_experts_per_tok=5"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(CONFIG | change)


def vmoe_arrays(model: VisionMoEClassifier) -> dict[str, Vector]:
    """The model's parameters under the names and in the layout of google-research/vmoe (its vit_moe_test.py)."""
    c, p = model.config, {name: value.numpy() for name, value in model.named_parameters()}
    arrays = {
        "embedding/kernel": p["w_patch"].transpose(2, 3, 1, 0),
        "embedding/bias": p["b_patch_D"],
        "Encoder/posembed_input/pos_embedding": p["position_LD"][None],
        "Encoder/encoder_norm/scale": p["norm_D"],
        "Encoder/encoder_norm/bias": p["b_norm_D"],
        "head/kernel": p["score_CD"].T,
        "head/bias": p["b_score_C"],
    }
    if c.pooling == "first":
        arrays["cls"] = p["class_1D"][None]
    for layer in range(c.num_layers):
        mine, theirs = f"layers.{layer}.", f"Encoder/encoderblock_{layer}/"
        for number, name in enumerate(("attention_norm_D", "ffn_norm_D")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = p[f"{mine}{name}"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = p[f"{mine}b_{name}"]
        for part, w, b in zip(
            ("query", "key", "value"), np.split(p[f"{mine}w_qkv"], 3), np.split(p[f"{mine}b_qkv"], 3), strict=True
        ):
            arrays[f"{theirs}SelfAttention/{part}/kernel"] = w.T.reshape(c.width, c.num_heads, c.head_dim)
            arrays[f"{theirs}SelfAttention/{part}/bias"] = b.reshape(c.num_heads, c.head_dim)
        arrays[f"{theirs}SelfAttention/out/kernel"] = p[f"{mine}w_o"].T.reshape(c.num_heads, c.head_dim, c.width)
        arrays[f"{theirs}SelfAttention/out/bias"] = p[f"{mine}b_o"]
        if c.layers[layer].num_experts:
            arrays[f"{theirs}Moe/Router/dense/kernel"] = p[f"{mine}w_router_ED"].T
            places = {"Moe/Mlp/Dense_0": ("w_in_PGD", "b_in_PG"), "Moe/Mlp/Dense_1": ("w_out_PDF", "b_out_PD")}
        else:
            places = {"Mlp/Dense_0": DENSE[:2], "Mlp/Dense_1": DENSE[2:]}
        for place, (w_name, b_name) in places.items():
            arrays[f"{theirs}{place}/kernel"] = np.swapaxes(p[f"{mine}{w_name}"], -1, -2)
            arrays[f"{theirs}{place}/bias"] = p[f"{mine}{b_name}"]
    return arrays


@pytest.mark.parametrize("name", VARIANTS)
def test_an_original_checkpoint_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    changes = {**VARIANTS[name], "image_mean": [0.5], "image_std": [0.5]}
    model = tiny_vision(**changes)
    np.savez(tmp_path / "vmoe.npz", **vmoe_arrays(model))  # type: ignore[arg-type]
    capacity = changes.get("expert_capacity", 0)
    loaded = import_vmoe(tmp_path / "vmoe.npz", tmp_path / "out", 2, capacity, ("cat", "dog", "owl"))
    np.testing.assert_array_equal(answers(loaded.model, images(3)), answers(model, images(3)))  # type: ignore[arg-type]
    assert loaded.labels == ("cat", "dog", "owl")
    load_checkpoint(tmp_path / "out").verify()


def test_other_names_and_what_cannot_be_read(tmp_path: Path) -> None:
    arrays = vmoe_arrays(tiny_vision())
    file = tmp_path / "vmoe.npz"

    def write(**changes: Any) -> None:
        np.savez(file, **{name: value for name, value in (arrays | changes).items() if value is not None})

    renamed = {name.replace("Dense_0", "wi").replace("Dense_1", "wo"): value for name, value in arrays.items()}
    np.savez(file, **renamed)  # type: ignore[arg-type]
    assert import_vmoe(file, tmp_path / "renamed").labels == ("0", "1", "2")
    for change, message in (
        ({"head/bias": None}, "array head/bias is missing"),
        (
            {"Encoder/encoderblock_2/Moe/Mlp/Dense_1/bias": None},
            "Encoder/encoderblock_2/Moe/Mlp/Dense_1/bias is missing",
        ),
        ({"pre_logits/kernel": np.zeros((16, 16))}, "array pre_logits/kernel belongs to nothing that we run"),
        ({"Encoder/encoder_norm/scale": np.zeros(15)}, r"encoder_norm/scale: gives \[15\], must give \[16\]"),
        ({"embedding/kernel": np.zeros(3)}, "must have 4 axes"),
    ):
        write(**change)
        with pytest.raises(CheckpointError, match=message):
            import_vmoe(file, tmp_path / "out")
    write()
    with pytest.raises(CheckpointError, match="2 labels are given, head/bias has 3 classes"):
        import_vmoe(file, tmp_path / "out", labels=("a", "b"))
    file.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"is not a whole \.npz file"):
        import_vmoe(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_of_layers_decide_which_parameters_exist() -> None:
    model = tiny_vision()
    assert model.config.layers[1] == LayerShape(0, ())
    assert hasattr(model.layers[1], "w_dense_in")
    assert not hasattr(model.layers[0], "w_dense_in")
    assert not hasattr(build(parse_config(CONFIG | VARIANTS["mean"])), "class_1D")

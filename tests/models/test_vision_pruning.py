"""Every pruning method on a V-MoE, from rows of images to a child that is verified; and experts that choose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint, load_checkpoint
from models.dataset import read_rows
from models.errors import DataError, PlanError
from models.evaluate import evaluate
from models.images import ImageEncoder
from models.pruning import METHODS
from models.pruning.calibrate import COLLECTORS, calibrate
from models.pruning.prune import prune
from models.pruning.stats import Classes, Core, Gram, LayerStats
from models.vision import VisionMoEClassifier
from tests.models.tiny_vision import VARIANTS, images, save_vision, tiny_vision

# Options that make a method quick, or that it needs.
OPTIONS: dict[str, dict[str, str]] = {
    "eep": {"population": "4", "generations": "2"},
    "mc-smoe": {"rank": "2"},
    "tsep": {"steps": "20", "window": "5"},
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 train images (the last 12 for dev), 30 test images, of three classes in turns."""
    pictures = images(150)[:, :, :, 0]
    label_N = np.arange(150) % 3
    file = tmp_path_factory.mktemp("rows") / "pets.npz"
    np.savez(
        file,
        x_train=pictures[:120],
        y_train=label_N[:120],
        x_test=pictures[120:],
        y_test=label_N[120:],
        classes=np.array(["cat", "dog", "owl"]),
    )
    return file


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each variant, and `pretrained-VARIANT` with other routers."""
    folder = tmp_path_factory.mktemp("parents")
    for name, changes in VARIANTS.items():
        model = tiny_vision(**changes)
        save_vision(folder / name, model, **changes)
        with torch.no_grad():
            for layer in (0, 2):
                model.get_parameter(f"layers.{layer}.w_router_ED").mul_(1 + torch.arange(4)[:, None] / 4)
        save_vision(folder / f"pretrained-{name}", model, **changes)
    return folder


def cut(parents: Path, name: str, method: str, rows_file: Path, out: Path, **options: Any) -> Checkpoint:
    chosen = OPTIONS.get(method, {})
    known = {option.name for option in METHODS[method].options}
    return prune(
        parents / name,
        method,
        options.pop("keep", 2),
        out,
        pretrained=parents / f"pretrained-{name}",
        data=rows_file,
        options={key: value for key, value in chosen.items() if key in known},
        **options,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_cuts_a_vision_model(parents: Path, rows_file: Path, tmp_path: Path, method: str) -> None:
    keep = None if method in ("moe-pruner",) else (2, 3)
    try:
        child = cut(parents, "token", method, rows_file, tmp_path / "child", keep=keep or 4)
    except PlanError as error:
        pytest.fail(f"{method}: {error}")
    assert isinstance(child.model, VisionMoEClassifier)
    result = evaluate(child, read_rows(rows_file, "test"))
    assert result.rows == 30
    parent = load_checkpoint(parents / "token")
    assert sum(child.weight_bytes().values()) <= sum(parent.weight_bytes().values())
    if keep:
        assert child.experts_kept == (2, 0, 3)
    assert child.manifest is not None
    assert child.manifest.accuracy is not None
    assert child.manifest.accuracy.data.rows == 12


@pytest.mark.parametrize("name", ["expert-choice", "expert-choice-mean"])
@pytest.mark.parametrize("method", ["router-norm-change", "frequency", "random", "mone", "hc-smoe"])
def test_experts_that_choose_keep_their_router_rows(
    parents: Path, rows_file: Path, tmp_path: Path, name: str, method: str
) -> None:
    child = cut(parents, name, method, rows_file, tmp_path / "child")
    assert child.manifest is not None
    assert child.manifest.semantics != "slice"
    assert all(layer.num_rows in (0, 4) for layer in child.model.config.layers)
    assert all(layer.lost_tokens is None or layer.lost_tokens == 0 for layer in child.manifest.layers)


def test_slice_is_refused_where_experts_choose(parents: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="slice would change every gate, random can do zero"):
        cut(parents, "expert-choice", "random", rows_file, tmp_path / "child", semantics="slice")
    with pytest.raises(PlanError, match="slice would change every gate, which is all naee can do"):
        cut(parents, "expert-choice", "naee", rows_file, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_statistics_where_experts_choose_are_those_of_a_loop() -> None:
    """Three images, experts take two tokens of each: counts, gates and norms from the layer's own tap."""
    model = tiny_vision(**VARIANTS["expert-choice"])
    vision = model.config.vision
    assert vision is not None
    encoder = ImageEncoder(vision, model.config.max_tokens)
    items = [encoder.encode(picture).ids for picture in images(3)]
    seen: dict[int, Any] = {}

    def tap(layer: int, x_TD: Any, logits_TE: Any, routing: Any, experts: Any) -> None:
        seen[layer] = (x_TD, routing, experts)

    with torch.inference_mode():
        plain_TD = model.hidden(model.pack(items), tap)
    groups = calibrate(model, items, list(COLLECTORS), labels=[0, 1, 2])
    for layer, (x_TD, routing, experts) in seen.items():
        stats = LayerStats(layer, 4, 2, groups=groups[layer])
        core, gram, classes = stats.need(Core), stats.need(Gram), stats.need(Classes)
        count_E, gate_E, norm_E = np.zeros(4), np.zeros(4), np.zeros(4)
        together_EE, by_class_CE = np.zeros((4, 4)), np.zeros((3, 4))
        for token, x_D in enumerate(x_TD):
            taken = [e for e in range(4) if routing.slot_TK[token, e] == e]
            for e in taken:
                hidden = torch.nn.functional.gelu(experts.w_in_PGD[e] @ x_D + experts.b_in_PG[e], approximate="tanh")
                count_E[e] += 1
                gate_E[e] += float(routing.weight_TK[token, e])
                norm_E[e] += float((experts.w_out_PDF[e] @ hidden + experts.b_out_PD[e]).norm())
                together_EE[e, taken] += 1
                by_class_CE[token // model.config.max_tokens, e] += 1
        np.testing.assert_array_equal(core.n_E, count_E)
        np.testing.assert_array_equal(core.n_E, [3 * 2] * 4)
        np.testing.assert_allclose(core.g_E, gate_E, rtol=1e-5)
        np.testing.assert_allclose(core.f_E, norm_E, rtol=1e-5)
        np.testing.assert_array_equal(gram.coact_EE, together_EE)
        np.testing.assert_array_equal(classes.n_CE, by_class_CE)
    assert plain_TD.shape == (15, 16)


def test_rows_of_the_other_kind_are_refused(parents: Path, tmp_path: Path) -> None:
    texts = tmp_path / "rows.csv"
    texts.write_text("text,label\na nice cat,cat\na good dog,dog\nan old owl,owl\n")
    with pytest.raises(DataError, match="this model reads images"):
        evaluate(load_checkpoint(parents / "token"), read_rows(texts))

"""Recovery after pruning, whatever the cut experts' rows mean afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kernels.compressed import CompressedExperts
from kernels.routing import ExpertWeights
from models.checkpoint import load_checkpoint
from models.config import Semantics
from models.dataset import label_ids, read_rows
from models.decoder import DecoderLayer, MoEClassifier
from models.errors import CheckpointError, ConfigError
from models.progress import silent
from models.pruning.prune import prune
from models.training import loop
from models.training.config import RECOVER_DEFAULTS, TrainConfig
from models.training.finetune import Classification, annealed, freeze, matching_experts, recover, set_top_k
from models.training.loop import Step
from models.training.losses import ExpertTap, RouterTap, distillation_loss, expert_loss, router_entropy
from models.training.optim import Optimizers

SHORT = replace(
    RECOVER_DEFAULTS, epochs=4, min_steps=1, batch_tokens=256, token_split=0.0, dropout=0.0, head_dropout=0.0
)
# Uneven layers throughout: two of eight experts in the first layer, five in the second.
CHILDREN: dict[Semantics, tuple[str, dict[str, str]]] = {
    "slice": ("frequency", {}),
    "zero": ("random", {}),
    "tie": ("hc-smoe", {}),
    "constant": ("mone", {}),
}
ROUTER = "model.layers.{}.mlp.gate.weight"


def cut(parent: Path, rows_file: Path, out: Path, semantics: Semantics) -> Path:
    method, options = CHILDREN[semantics]
    prune(parent, method, (2, 5), out, data=rows_file, semantics=semantics, options=options)
    return out


def loss_of(checkpoint: Path, rows_file: Path, top_k: int = 2) -> float:
    """Mean cross-entropy on the train rows."""
    loaded = load_checkpoint(checkpoint)
    assert isinstance(loaded.model, MoEClassifier)
    set_top_k(loaded.model, min(top_k, loaded.model.config.top_k))
    rows = read_rows(rows_file, "train")
    logits_BC = loaded.model.classify([loaded.encoder.encode(row.text).ids for row in rows]).logits_BC
    return float(torch.nn.functional.cross_entropy(logits_BC, torch.tensor(label_ids(rows, loaded.labels))))


@pytest.mark.parametrize("semantics", CHILDREN)
def test_recovery_lowers_the_loss_and_keeps_the_shape(
    semantics: Semantics, parent: Path, rows_file: Path, tmp_path: Path
) -> None:
    child = cut(parent, rows_file, tmp_path / "child", semantics)
    recovered = recover(child, rows_file, tmp_path / "recovered", SHORT, teacher=parent)
    assert loss_of(recovered.path, rows_file) < loss_of(child, rows_file)
    before = load_checkpoint(child)
    assert recovered.manifest is not None
    assert before.manifest is not None
    assert recovered.manifest.semantics == semantics
    assert recovered.manifest.layers == before.manifest.layers
    assert recovered.experts_kept == (2, 5)
    # Rows that share an expert have one tensor for it, in memory and on disk.
    old, new = load_file(child / "model.safetensors"), load_file(recovered.path / "model.safetensors")
    assert {name: t.shape for name, t in old.items()} == {name: t.shape for name, t in new.items()}
    # Only the router of tied rows stays as it was; everything else has moved.
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == ({ROUTER.format(0), ROUTER.format(1)} if semantics == "tie" else set())
    assert recovered.manifest.training is not None
    record = recovered.manifest.training["recovery"]
    assert record["frozen"] == (["w_router_ED"] if semantics == "tie" else [])
    assert record["teacher"] == "parent"
    assert (record["config"]["distill"], record["config"]["temperature"]) == (SHORT.distill, 2.0)


def test_a_frozen_router_keeps_its_bits_and_a_tied_one_can_be_trained(
    parent: Path, rows_file: Path, tmp_path: Path
) -> None:
    for semantics, routers, stays in (("zero", "frozen", True), ("tie", "trained", False)):
        child = cut(parent, rows_file, tmp_path / f"{semantics}-child", semantics)  # type: ignore[arg-type]
        config = replace(SHORT, epochs=1, routers=routers)  # type: ignore[arg-type]
        recovered = recover(child, rows_file, tmp_path / semantics, config)
        old, new = load_file(child / "model.safetensors"), load_file(recovered.path / "model.safetensors")
        assert all(torch.equal(old[ROUTER.format(i)], new[ROUTER.format(i)]) == stays for i in (0, 1))
        assert recovered.manifest is not None
        assert recovered.manifest.training is not None
        movement = recovered.manifest.training["recovery"]["router_movement"]
        assert (movement == [0.0, 0.0]) == stays
        assert recovered.manifest.training["recovery"]["teacher"] is None


def test_constants_can_be_frozen(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    child = cut(parent, rows_file, tmp_path / "child", "constant")
    frozen = recover(child, rows_file, tmp_path / "frozen", replace(SHORT, epochs=1, freeze_constants=True))
    old, new = load_checkpoint(child).model, frozen.model
    for index in (0, 1):
        assert torch.equal(layer(old, index).const_CD, layer(new, index).const_CD)
        assert not torch.equal(layer(old, index).w_in_PGD, layer(new, index).w_in_PGD)


def layer(model: Any, index: int) -> DecoderLayer:
    found = model.layers[index]
    assert isinstance(found, DecoderLayer)
    return found


def test_both_rows_of_a_merge_train_its_expert(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    """The gradient of a shared expert is the sum over the tokens of all rows that lead to it."""
    child = load_checkpoint(cut(parent, rows_file, tmp_path / "child", "tie"), dtype="float32")
    model = child.model.requires_grad_(True)
    assert isinstance(model, MoEClassifier)
    route_E = model.config.layers[0].route_E
    slot = max(set(route_E), key=route_E.count)
    assert route_E.count(slot) >= 2
    texts: Any = [child.encoder.encode(row.text).ids for row in read_rows(rows_file, "train")]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(model.pack(texts)).square().sum().backward()
        grad = layer(model, 0).w_out_PDF.grad
        assert grad is not None
        return grad[slot].clone()

    whole = gradient()
    table = layer(model, 0).table_VE
    partial = []
    for row in (e for e, s in enumerate(route_E) if s == slot):
        table[0, row] = -1
        partial.append(float((whole - gradient()).norm()))
        table[0, row] = slot
    assert sum(change > 0 for change in partial) >= 2


def test_a_frozen_recovery_that_was_cut_short_resumes_to_the_same_bits(
    parent: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = cut(parent, rows_file, tmp_path / "child", "tie")
    whole = recover(child, rows_file, tmp_path / "whole", SHORT, teacher=parent)
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 3)

    def stop(done: int, total: int, message: str) -> None:
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(child, rows_file, tmp_path / "cut", SHORT, teacher=parent, progress=stop)
    resumed = recover(child, rows_file, tmp_path / "cut", SHORT, teacher=parent)
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]


def test_stronger_distillation_comes_closer_to_the_teacher(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    child = cut(parent, rows_file, tmp_path / "child", "zero")
    teacher = load_checkpoint(parent)
    texts = [teacher.encoder.encode(row.text).ids for row in read_rows(rows_file, "test")]
    want = torch.softmax(teacher.model.classify(texts).logits_BC, 1)
    gap = {}
    for weight in (0.0, 5.0):
        config = replace(SHORT, epochs=6, distill=weight)
        recovered = recover(child, rows_file, tmp_path / f"by-{weight}", config, teacher=parent)
        gap[weight] = float((torch.softmax(recovered.model.classify(texts).logits_BC, 1) - want).abs().mean())
    assert gap[5.0] < gap[0.0]


def test_top_k_falls_to_its_end_halfway() -> None:
    assert [annealed(4, 1, share) for share in (0.0, 0.1, 0.2, 0.4, 0.5, 0.9)] == [4, 4, 3, 2, 1, 1]
    assert [annealed(2, 1, share) for share in (0.0, 0.49, 0.5)] == [2, 2, 1]


def test_a_recovery_may_end_with_fewer_experts_per_token(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    child = cut(parent, rows_file, tmp_path / "child", "slice")
    recovered = recover(child, rows_file, tmp_path / "top-1", replace(SHORT, final_top_k=1, router_entropy=0.01))
    again = load_checkpoint(recovered.path)
    assert again.model.config.top_k == 1
    again.verify()
    assert loss_of(recovered.path, rows_file) < loss_of(child, rows_file, top_k=1)
    with pytest.raises(ConfigError, match="final_top_k is 2, must be below the 2"):
        recover(child, rows_file, tmp_path / "out", replace(SHORT, final_top_k=2))


def test_router_entropy_by_hand() -> None:
    """(.5, .25, .15, .10) has 1.2080 nats, one certain choice none; the loss is the mean over tokens, then layers."""
    tap = RouterTap()
    tap.probability_TE = [torch.tensor([[0.5, 0.25, 0.15, 0.10]] * 3), torch.tensor([[1.0, 0.0, 0.0, 0.0]])]
    assert float(router_entropy(tap)) == pytest.approx(1.2080 / 2, abs=1e-4)


def test_what_is_frozen(parent: Path) -> None:
    def frozen(config: TrainConfig, is_tied: bool) -> list[str]:
        model = load_checkpoint(parent).model.requires_grad_(True)
        assert isinstance(model, MoEClassifier)
        freeze(model, config, is_tied)
        return [name for name, p in model.named_parameters() if not p.requires_grad]

    routers = ["layers.0.w_router_ED", "layers.1.w_router_ED"]
    assert frozen(TrainConfig(), is_tied=True) == routers
    assert frozen(TrainConfig(), is_tied=False) == []
    assert frozen(TrainConfig(routers="frozen"), is_tied=False) == routers
    assert frozen(TrainConfig(routers="trained"), is_tied=True) == []


def test_recovery_refuses_what_is_there(parent: Path, rows_file: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        recover(parent, rows_file, parent, SHORT)


def objective(parent: Path, rows_file: Path, config: TrainConfig) -> tuple[Classification, Step]:
    """Recovery of the parent towards itself, without noise, on its train rows as one batch."""
    loaded = load_checkpoint(parent, dtype="float32")
    rows = read_rows(rows_file, "train")
    items: Any = [loaded.encoder.encode(row.text).ids for row in rows]
    quiet = replace(config, dropout=0.0, head_dropout=0.0)
    teacher = load_checkpoint(parent).model.requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    found = Classification(
        loaded.model, items, label_ids(rows, loaded.labels), lambda item, generator: item, quiet, teacher
    )
    return found, Step(tuple(items), tuple(range(len(items))))


def test_the_loss_is_the_task_and_each_weighted_term(parent: Path, rows_file: Path) -> None:
    def loss(**changes: Any) -> float:
        found, step = objective(parent, rows_file, replace(TrainConfig(distill=0.0), **changes))
        return float(found.loss(step))

    found, step = objective(parent, rows_file, TrainConfig())
    with torch.no_grad():
        tap = RouterTap()
        logits_BC = found.model(found.model.pack(step.sequences), tap)
    assert found.teacher is not None
    teacher_BC = found.teacher.classify(step.sequences).logits_BC
    task = float(torch.nn.functional.cross_entropy(logits_BC, found.label_N))
    assert loss() == pytest.approx(task, rel=1e-4)
    assert loss(router_entropy=0.5) - task == pytest.approx(0.5 * float(router_entropy(tap)), rel=1e-3)
    for temperature in (1.0, 4.0):
        term = 0.2 * float(distillation_loss(logits_BC, teacher_BC, temperature))
        assert loss(distill=0.2, temperature=temperature) - task == pytest.approx(term, rel=1e-3)


def test_top_k_falls_while_training(parent: Path, rows_file: Path) -> None:
    found, step = objective(parent, rows_file, TrainConfig(distill=0.0, final_top_k=1))
    chosen = []
    for share in (0.0, 0.3, 0.5, 0.99):
        found.loss(replace(step, share=share))
        chosen.append((found.model.config.top_k, layer(found.model, 1).policy.top_k))
    assert chosen == [(2, 2), (2, 2), (1, 1), (1, 1)]


def test_constants_do_not_decay(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    model = load_checkpoint(cut(parent, rows_file, tmp_path / "child", "constant")).model.requires_grad_(True)
    groups = [g for o in Optimizers(model.named_parameters(), SHORT).optimizers for g in o.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(layer(model, 0).const_CD)] == 0.0
    assert decay[id(layer(model, 0).w_in_PGD)] > 0.0


class Shares:
    """An objective of four texts that notes how much of the training lies behind each step."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.seen: list[float] = []

    def epoch(self, generator: Any) -> list[tuple[int, tuple[int, ...]]]:
        return [(i, (1,)) for i in range(4)]

    def loss(self, step: Step) -> torch.Tensor:
        self.seen.append(step.share)
        loss: torch.Tensor = self.module(torch.ones(1, 1)).sum()
        return loss


def test_every_step_knows_its_share_of_the_training() -> None:
    module = torch.nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    before, objective = module.bias.clone(), Shares(module)
    loop.train(module, objective, TrainConfig(epochs=2, min_steps=1, batch_tokens=1), None, "", silent)
    assert objective.seen == pytest.approx([i / 8 for i in range(8)])
    assert torch.equal(module.bias, before)


@pytest.mark.parametrize(
    ("method", "keep", "options", "held"),
    [
        ("moe-pruner", 1.0, {"pattern": "2:4"}, "mask"),
        ("mc-smoe", 4, {"rank": "4", "row_ratio": "0.25"}, "index"),
    ],
)
def test_compressed_experts_train_in_their_form(
    method: str, keep: float, options: dict[str, str], held: str, parent: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Kept values, factors and rows train; which places they have does not change."""
    prune(parent, method, keep, tmp_path / "child", data=rows_file, options=options)
    recovered = recover(tmp_path / "child", rows_file, tmp_path / "recovered", SHORT, teacher=parent)
    assert loss_of(recovered.path, rows_file) < loss_of(tmp_path / "child", rows_file)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("child", "recovered"))
    assert old.keys() == new.keys()
    in_experts = [name for name in old if ".experts." in name]
    assert {name for name in in_experts if torch.equal(old[name], new[name])} == {
        name for name in in_experts if name.endswith(held)
    }
    assert any(name.endswith(held) for name in in_experts)


def one_by_one(w_out: list[float], w_in: float = 1.0) -> ExpertWeights:
    """Experts of a single neuron: relu(w_in x) times w_out."""
    return ExpertWeights(
        torch.full((len(w_out), 1, 1), w_in),
        torch.tensor(w_out).view(-1, 1, 1).requires_grad_(),
        activation="relu",
        gated=False,
    )


def test_expert_loss_by_hand() -> None:
    """Expert 0 is off by half of its inputs 1 and 3: (.25 + 2.25) / 2; expert 1 by 2 on its input 2: 4; 2 has none."""
    x_TD = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    slot_TK = torch.tensor([[0, -1], [1, -2], [-1, 0]])
    student, teacher = one_by_one([1.5, 0.0, 9.0]), one_by_one([2.0, 1.0, 1.0])
    loss = expert_loss(x_TD, slot_TK, student, teacher)
    assert float(loss.detach()) == pytest.approx(1.25 + 4.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x_TD.grad is None
    assert teacher.w_out_PDF.grad is None
    # d/dw of (w x - v x)^2 is 2 (w - v) x^2: the mean of -1 and -9, and -8.
    assert student.w_out_PDF.grad is not None
    assert student.w_out_PDF.grad.flatten().tolist() == pytest.approx([-5.0, -8.0, 0.0])
    assert float(expert_loss(x_TD, slot_TK, teacher, teacher).detach()) == 0.0


@pytest.fixture
def masked(parent: Path, rows_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "masked"
    prune(parent, "moe-pruner", 1.0, out, data=rows_file, options={"pattern": "2:4"})
    return out


def apart(child: Path, parent: Path, rows_file: Path) -> float:
    """The experts' loss on the train rows, by another way: outputs of dense twins, expert by expert."""
    student, teacher = load_checkpoint(child), load_checkpoint(parent)
    texts = [student.encoder.encode(row.text).ids for row in read_rows(rows_file, "train")]
    total = 0.0

    def tap(layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Any, experts: Any) -> None:
        nonlocal total
        assert isinstance(experts, CompressedExperts)
        pair: tuple[Any, ...] = (experts.dense(), teacher.model.layers[layer].experts)
        for expert in range(experts.num_experts):
            x_RD = x_TD[(routing.slot_TK == expert).any(1)].double()
            outputs = []
            for dense in pair:
                gate_RF, up_RF = (x_RD @ dense.w_in_PGD[expert].double().T).chunk(2, dim=1)
                h_RF = torch.nn.functional.silu(gate_RF) * up_RF
                outputs.append(h_RF @ dense.w_out_PDF[expert].double().T)
            if len(x_RD):
                total += float((outputs[0] - outputs[1]).square().mean())

    with torch.inference_mode():
        student.model.hidden(student.model.pack(texts), tap)
    return total


def test_expert_distillation_weighs_as_much_as_the_cross_entropy_at_the_start(
    masked: Path, parent: Path, rows_file: Path
) -> None:
    student, teacher = load_checkpoint(masked, dtype="float32"), load_checkpoint(parent, dtype="float32").model
    rows = read_rows(rows_file, "train")
    texts: list[Any] = [student.encoder.encode(row.text).ids for row in rows]
    labels = label_ids(rows, student.labels)
    config = replace(SHORT, expert_distill=1.0, distill=0.0, batch_tokens=100_000)
    objective = Classification(student.model, texts, labels, lambda ids, _: ids, config, teacher)
    wrong = loss_of(masked, rows_file)
    assert objective.expert_weight == pytest.approx(wrong / apart(masked, parent, rows_file), rel=1e-4)
    step = Step(tuple(map(tuple, texts)), tuple(range(len(texts))))
    assert float(objective.loss(step).detach()) == pytest.approx(2 * wrong, rel=1e-4)
    double = Classification(
        student.model, texts, labels, lambda ids, _: ids, replace(config, expert_distill=2.0), teacher
    )
    assert double.expert_weight == pytest.approx(2 * objective.expert_weight)
    short = replace(config, batch_tokens=1)  # a first batch holds one text at least
    assert Classification(student.model, texts, labels, lambda ids, _: ids, short, teacher).expert_weight > 0


def test_experts_that_are_their_teachers_weigh_nothing(parent: Path, rows_file: Path) -> None:
    model, twin = load_checkpoint(parent).model, load_checkpoint(parent).model
    rows = read_rows(rows_file, "train")[:4]
    encoder = load_checkpoint(parent).encoder
    texts = [encoder.encode(row.text).ids for row in rows]
    config = replace(SHORT, expert_distill=1.0)
    assert Classification(model, texts, [0] * 4, lambda ids, _: ids, config, twin).expert_weight == 0.0


def test_expert_distillation_brings_experts_nearer_and_moves_no_mask(
    masked: Path, parent: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = replace(SHORT, distill=0.0, routers="frozen", epochs=8, trunk_rate=1.0)
    plain = recover(masked, rows_file, tmp_path / "plain", config, teacher=parent)
    near = recover(masked, rows_file, tmp_path / "near", replace(config, expert_distill=3.0), teacher=parent)
    assert apart(near.path, parent, rows_file) < 0.8 * apart(plain.path, parent, rows_file)
    old, new = load_file(masked / "model.safetensors"), load_file(near.path / "model.safetensors")
    masks = [name for name in old if name.endswith("mask")]
    assert len(masks) == 2 * 8 * 3
    assert all(torch.equal(old[name], new[name]) for name in masks)
    assert near.manifest is not None
    assert near.manifest.training is not None
    assert near.manifest.training["recovery"]["config"]["expert_distill"] == 3.0


def test_expert_distillation_that_was_cut_short_resumes_to_the_same_bits(
    masked: Path, parent: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, expert_distill=1.0)
    whole = recover(masked, rows_file, tmp_path / "whole", config, teacher=parent)
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 3)

    def stop(done: int, total: int, message: str) -> None:
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(masked, rows_file, tmp_path / "cut", config, teacher=parent, progress=stop)
    resumed = recover(masked, rows_file, tmp_path / "cut", config, teacher=parent)
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]


def test_expert_distillation_says_what_it_needs(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    config, out = replace(SHORT, expert_distill=1.0), tmp_path / "out"
    child = cut(parent, rows_file, tmp_path / "child", "zero")
    with pytest.raises(ConfigError, match="give --teacher DIR"):
        recover(child, rows_file, out, config)
    with pytest.raises(CheckpointError, match="layer 0 has 2 and the teacher's 8: leave it out"):
        recover(child, rows_file, out, config, teacher=parent)
    assert not out.exists()
    model = load_checkpoint(parent).model
    other = load_checkpoint(parent).model
    other.config = replace(other.config, family="mixtral")
    with pytest.raises(CheckpointError, match="needs a teacher of the family qwen3_moe and width"):
        matching_experts(model, other)
    assert set(matching_experts(model, model)) == {0, 1}
    assert ExpertTap(matching_experts(model, model)).losses == []

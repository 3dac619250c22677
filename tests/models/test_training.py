"""Training: reproducible, resumable to the same bits, and really learning."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.checkpoint import load_checkpoint
from models.dataset import Row, read_rows
from models.errors import CheckpointError, ConfigError, DataError
from models.evaluate import evaluate
from models.packed import PackedBatch
from models.pruning.prune import prune
from models.training import loop
from models.training.augment import TokenSplitter, crop, drop_tokens, window
from models.training.config import (
    FINETUNE_DEFAULTS,
    FINETUNE_UNREAD,
    PRETRAIN_DEFAULTS,
    PRETRAIN_UNREAD,
    RECOVER_DEFAULTS,
    TrainConfig,
    load_train_config,
)
from models.training.finetune import finetune, recover
from models.training.loop import TrainingError, epoch_steps
from models.training.losses import DomainLoss, RouterTap, balance_loss, distillation_loss
from models.training.noise import Dropout
from models.training.optim import Optimizers, schedule
from models.training.pretrain import pretrain
from tests.models.colours import QUICK


def test_fine_tuning_learns_the_task(parent: Path, rows_file: Path) -> None:
    result = evaluate(load_checkpoint(parent), read_rows(rows_file, "test"))
    assert result.accuracy > 0.9


def test_the_manifest_records_how_routers_were_trained(parent: Path, base: Path) -> None:
    manifest = load_checkpoint(parent).manifest
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training["router_optimizer"] == "sgd"
    before, after = load_file(base / "model.safetensors"), load_file(parent / "model.safetensors")
    name = "model.layers.0.mlp.gate.weight"
    moved = float((after[name] - before[name]).norm() / before[name].norm())
    assert manifest.training["router_movement"][0] == pytest.approx(moved, abs=1e-4)
    assert manifest.accuracy is not None
    assert manifest.accuracy.data.rows == sum(
        row.split == "dev" for row in read_rows_of(manifest.accuracy.data.name, base)
    )


def read_rows_of(name: str, base: Path) -> tuple[Row, ...]:
    file = next(base.parent.parent.rglob(name))
    return read_rows(file)


def test_a_base_is_a_causal_language_model_of_transformers(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    oracle, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        loss = oracle(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss
    assert torch.isfinite(loss)


def test_same_seed_same_bytes_other_seed_other_bytes(base: Path, rows_file: Path, tmp_path: Path) -> None:
    once = replace(QUICK, epochs=1)
    for name, config in (("a", once), ("b", once), ("c", replace(once, seed=1))):
        finetune(base, rows_file, tmp_path / name, config)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_run_that_was_cut_short_resumes_to_the_same_bits(
    base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(QUICK, epochs=2, dropout=0.2, path_dropout=0.2)
    whole = finetune(base, rows_file, tmp_path / "whole", config)
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 3)

    def stop(done: int, total: int, message: str) -> None:
        if done > 700:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, rows_file, tmp_path / "cut", config, progress=stop)
    assert (tmp_path / "cut.training" / "state.safetensors").exists()
    assert not (tmp_path / "cut").exists()

    first: list[int] = []
    resumed = finetune(base, rows_file, tmp_path / "cut", config, progress=lambda done, *_: first.append(done))
    assert first[0] >= 500, "training began anew instead of resuming"
    assert whole.files["model.safetensors"] == resumed.files["model.safetensors"]
    assert not (tmp_path / "cut.training").exists()


def test_pretraining_that_was_cut_short_resumes_to_the_same_bits(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running use of experts by corpus is part of the state, and epochs may be shorter than the steps to a save."""
    config = replace(PRETRAIN_DEFAULTS, epochs=3, min_steps=1, batch_tokens=512)
    pretrain([rows_file, rows_file], tmp_path / "whole", config, size="tiny")
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 9)

    def stop(done: int, total: int, message: str) -> None:
        if done > 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain([rows_file, rows_file], tmp_path / "cut", config, size="tiny", progress=stop)
    assert (tmp_path / "cut.training" / "state.safetensors").exists()
    (tmp_path / "cut.training" / ".state.safetensors.tmp").write_bytes(b"killed while writing")
    first: list[int] = []
    pretrain(
        [rows_file, rows_file], tmp_path / "cut", config, size="tiny", progress=lambda done, *_: first.append(done)
    )
    assert next(done for done in first if done) > 300, "training began anew instead of resuming"
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert not (tmp_path / "cut.training").exists()


def test_a_broken_saved_run_says_what_to_do(base: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "state.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"broken file .* remove it to start anew"):
        finetune(base, rows_file, tmp_path / "out", QUICK)


def test_a_dev_label_without_train_rows_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label,split\na,x,train\nb,y,train\nc,z,dev\n")
    with pytest.raises(DataError, match="label 'z' is unknown"):
        finetune(base, file, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_keys_that_a_stage_does_not_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for key, defaults, unread in (
        ("crop", PRETRAIN_DEFAULTS, PRETRAIN_UNREAD),
        ("domain_loss", FINETUNE_DEFAULTS, FINETUNE_UNREAD),
    ):
        file.write_text(f"{key}: 0.5\n")
        with pytest.raises(ConfigError, match=f"{key} has no meaning"):
            load_train_config(file, defaults, unread)


def test_a_saved_run_of_another_configuration_is_refused(
    base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_STEPS", 1)

    def stop(done: int, total: int, message: str) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, rows_file, tmp_path / "cut", QUICK, progress=stop)
    with pytest.raises(TrainingError, match="another configuration"):
        finetune(base, rows_file, tmp_path / "cut", replace(QUICK, learning_rate=1e-4))


def test_diverging_training_says_so(base: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower the learning rates"):
        finetune(base, rows_file, tmp_path / "out", replace(QUICK, learning_rate=900.0, router_learning_rate=900.0))
    assert not (tmp_path / "out").exists()


def test_recovery_keeps_the_cut_and_its_record(parent: Path, base: Path, rows_file: Path, tmp_path: Path) -> None:
    child = prune(parent, "router-norm-change", 2, tmp_path / "child", pretrained=base)
    recovered = recover(tmp_path / "child", rows_file, tmp_path / "recovered", RECOVER_DEFAULTS, teacher=parent)
    assert recovered.experts_kept == child.experts_kept == (2, 2)
    assert recovered.manifest is not None
    assert child.manifest is not None
    assert recovered.manifest.layers == child.manifest.layers
    assert recovered.manifest.method == "router-norm-change"
    assert recovered.manifest.parent == child.manifest.parent
    assert recovered.manifest.training is not None
    assert set(recovered.manifest.training) == {"finetuning", "recovery"}
    assert recovered.files["model.safetensors"] != child.files["model.safetensors"]


def test_recovery_towards_a_teacher_comes_closer_to_it(
    parent: Path, base: Path, rows_file: Path, tmp_path: Path
) -> None:
    prune(parent, "random", 2, tmp_path / "child")
    config = replace(RECOVER_DEFAULTS, epochs=10, batch_tokens=256, token_split=0.0, dropout=0.0, head_dropout=0.0)
    recover(tmp_path / "child", rows_file, tmp_path / "recovered", config, teacher=parent)
    teacher, before, after = (load_checkpoint(path) for path in (parent, tmp_path / "child", tmp_path / "recovered"))
    texts = [teacher.encoder.encode(row.text).ids for row in read_rows(rows_file, "test")]
    want = teacher.model.classify(texts).logits_BC
    gap = [float(distillation_loss(c.model.classify(texts).logits_BC, want)) for c in (before, after)]
    assert gap[1] < gap[0]


def test_refusals(base: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(DataError, match="at least 2"):
        finetune(base, tmp_path / "one.csv", tmp_path / "out", QUICK)
    with pytest.raises(ConfigError, match="max_tokens is 600, the model reads at most 512"):
        finetune(base, rows_file, tmp_path / "out", replace(QUICK, max_tokens=600))
    with pytest.raises(CheckpointError, match="exists already"):
        finetune(base, rows_file, base, QUICK)
    with pytest.raises(ConfigError, match="size is 'huge', must be one of"):
        pretrain([rows_file], tmp_path / "out", PRETRAIN_DEFAULTS, size="huge")
    with pytest.raises(ConfigError, match="family is 'bert', must be one of"):
        pretrain([rows_file], tmp_path / "out", PRETRAIN_DEFAULTS, family="bert")


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral"])
def test_other_families_train_too(family: str, rows_file: Path, tmp_path: Path) -> None:
    quick = replace(PRETRAIN_DEFAULTS, epochs=1, min_steps=1, batch_tokens=2048)
    pretrain([rows_file], tmp_path / "base", quick, family=family, size="tiny")
    tuned = finetune(tmp_path / "base", rows_file, tmp_path / "tuned", replace(QUICK, epochs=1), pooling="last")
    assert tuned.model.config.family == family
    assert tuned.model.config.pooling == "last"


def test_config_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 3\nlearning_rate: 1\n")
    assert load_train_config(file, FINETUNE_DEFAULTS) == replace(FINETUNE_DEFAULTS, epochs=3, learning_rate=1.0)
    assert load_train_config(None, FINETUNE_DEFAULTS) is FINETUNE_DEFAULTS
    for content, message in (
        ("epoch: 3", "unknown key 'epoch', did you mean epochs"),
        ("epochs: 0", "epochs is 0, must be at least 1"),
        ("epochs: three", "epochs is 'three', must be a int"),
        ("dropout: 1.0", "dropout is 1.0, must be at least 0 and below 1"),
        ("learning_rate: -1", "must be positive"),
        ("learning_rate: .nan", "must be positive"),
        ("router_optimizer: adam", "must be sgd or adamw"),
        ("- 3", "must be a mapping"),
        ("a: [", "cannot be read as YAML"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_train_config(file, FINETUNE_DEFAULTS)


def test_schedule_warms_up_and_cools_down() -> None:
    rates = [schedule(i / 100) for i in range(101)]
    assert rates[0] == 0.0
    assert rates[6] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.02)
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_routers_are_under_sgd_and_nothing_else_is(parent: Path) -> None:
    model = load_checkpoint(parent).model
    adamw, sgd = Optimizers(model.named_parameters(), TrainConfig()).optimizers
    under_sgd = {id(p) for group in sgd.param_groups for p in group["params"]}
    assert under_sgd == {id(p) for name, p in model.named_parameters() if name.endswith("w_router_ED")}
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.0]
    in_all = [p for o in (adamw, sgd) for group in o.param_groups for p in group["params"]]
    assert len(in_all) == len(list(model.parameters()))
    assert len(Optimizers(model.named_parameters(), TrainConfig(router_optimizer="adamw")).optimizers) == 1


class Texts:
    """An objective of 50 texts, for looking at batches."""

    def epoch(self, generator: np.random.Generator) -> list[tuple[int, tuple[int, ...]]]:
        return [(i, (1,) * (1 + i % 17)) for i in range(50)]

    def loss(self, step: loop.Step) -> torch.Tensor:
        raise AssertionError("not trained here")


def test_few_rows_are_passed_over_until_there_are_enough_steps(base: Path, rows_file: Path, tmp_path: Path) -> None:
    done: list[int] = []
    config = replace(QUICK, epochs=1, min_steps=50)
    finetune(base, rows_file, tmp_path / "out", config, progress=lambda share, total, message: done.append(share))
    steps = done.index(1000) + 1
    assert 50 <= steps < 60


def test_an_epoch_shows_every_text_once_within_the_budget() -> None:
    config = TrainConfig(batch_tokens=40)
    steps = epoch_steps(Texts(), config, 0)
    assert sorted(row for step in steps for row in step.rows) == list(range(50))
    assert all(max(map(len, step.sequences)) * len(step.sequences) <= 40 for step in steps)
    assert epoch_steps(Texts(), config, 0) == steps
    assert epoch_steps(Texts(), config, 1) != steps


@pytest.fixture
def splitter(base: Path) -> TokenSplitter:
    return TokenSplitter(base / "tokenizer.json")


def test_splitting_tokens_keeps_the_text(base: Path, splitter: TokenSplitter) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode("orange thing12 stone").ids
    split = splitter(ids, 0.9, np.random.default_rng(0))
    assert len(split) > len(ids)
    assert tokenizer.decode(list(split)) == tokenizer.decode(ids)
    assert splitter(ids, 0.0, np.random.default_rng(0)) == tuple(ids)


def test_dropping_cropping_and_windows() -> None:
    generator = np.random.default_rng(0)
    ids = tuple(range(1000))
    assert len(drop_tokens(ids, 0.5, generator)) == pytest.approx(500, abs=80)
    assert drop_tokens((1, 2, 3), 0.99, generator) == (1, 2, 3)
    assert len(drop_tokens((1, 2, 3, 4), 0.9999, generator)) == 1
    part = crop(ids, generator)
    assert part == tuple(range(part[0], part[0] + len(part)))
    assert 300 <= len(part) <= 1000
    assert window(ids[:5], 10, generator) == ids[:5]
    starts = {window(ids, 10, generator)[0] for _ in range(100)}
    assert 0 in starts
    assert len(starts) > 20


def test_path_dropout_drops_whole_texts_and_keeps_the_mean() -> None:
    batch = PackedBatch.pack([[1] * 3] * 2000)
    x_TD = torch.ones(6000, 4)
    noised = Dropout(batch, activation=0.0, path=0.25).branch(x_TD).view(2000, -1)
    assert sorted(set(noised.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert (noised == noised[:, :1]).all()
    assert float(noised.mean()) == pytest.approx(1.0, abs=0.05)


def tap_of(probability: torch.Tensor, slots: torch.Tensor) -> RouterTap:
    tap = RouterTap()
    tap.probability_TE, tap.slot_TK = [probability], [slots]
    return tap


def test_balance_loss_is_one_when_even_and_e_when_collapsed() -> None:
    even = tap_of(torch.full((4, 4), 0.25), torch.tensor([[0], [1], [2], [3]]))
    collapsed = tap_of(torch.tensor([[1.0, 0, 0, 0]] * 4), torch.tensor([[0]] * 4))
    assert float(balance_loss(even)) == pytest.approx(1.0)
    assert float(balance_loss(collapsed)) == pytest.approx(4.0)


def test_domain_loss_prefers_experts_of_one_corpus() -> None:
    shared = torch.full((4, 2), 0.5)
    apart = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    corpus = torch.tensor([0, 0, 1, 1])
    slots = torch.zeros(4, 1, dtype=torch.int64)

    def settled(probability: torch.Tensor) -> float:
        loss = DomainLoss(num_layers=1, num_corpora=2, num_experts=2)
        return [float(loss(tap_of(probability, slots), corpus)) for _ in range(100)][-1]

    assert settled(shared) == pytest.approx(0.0, abs=1e-4)
    assert settled(apart) == pytest.approx(-np.log(2), abs=1e-2)


def test_distillation_is_zero_at_the_teacher() -> None:
    logits = torch.randn(5, 3)
    assert float(distillation_loss(logits, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(distillation_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]))) == pytest.approx(
        4 * sum(p * np.log(p / 0.5) for p in (0.880797, 0.119203)), abs=1e-4
    )


def test_gradients_reach_every_parameter(make_oracle: Callable[..., object], base: Path) -> None:
    model = load_checkpoint_of(base)
    batch = PackedBatch.pack([[1, 5, 9, 30], [7, 8]])
    model(batch).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


def load_checkpoint_of(base: Path) -> torch.nn.Module:
    from models.training.initial import fresh_head

    model, _ = fresh_head(base, ("a", "b"), "mean", max_tokens=64, seed=0)
    return model

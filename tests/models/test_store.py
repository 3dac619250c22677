"""Statistics on disk: back to the bit, merged exactly, refused when they are of something else."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.errors import PlanError
from models.manifest import Rows
from models.pruning.stats import Core, Gram, LayerStats, Means, Sample
from models.pruning.store import Meta, Stored, load, merge, refuse_other, save
from tests.models.golden import golden

META = Meta(
    parent_sha256="p",
    data=(Rows(name="rows", rows=4, sha256="d"),),
    kind="softmax",
    top_k=2,
    normalize=True,
    dtype="float32",
    seed=0,
    sample=3,
)


def random_stats(seed: int, shard: str = "d") -> Stored:
    """Two layers with arrays nobody made by hand."""
    generator = np.random.default_rng(seed)

    def layer(index: int) -> LayerStats:
        groups = []
        for group in golden(index).groups:
            values = {f.name: getattr(group, f.name) for f in fields(group)}
            groups.append(type(group)(**{name: _noise(value, generator) for name, value in values.items()}))
        sizes = ((5, 2), (5, 4), (5, 4, 2))
        floats = (generator.normal(size=size).astype(np.float32) for size in sizes)
        sample = Sample(5, np.sort(generator.integers(0, 1 << 63, 5).astype(np.uint64)), *floats)
        return replace(golden(index), groups=(*groups, sample))

    part = META.model_copy(update={"data": (Rows(name=shard, rows=4, sha256=shard),)})
    return Stored(part, {index: layer(index) for index in (0, 3)})


def _noise(value: Any, generator: np.random.Generator) -> Any:
    array = np.asarray(value)
    noise = generator.integers(1, 100, array.shape) if array.dtype.kind == "i" else generator.normal(size=array.shape)
    return np.asarray(noise, dtype=array.dtype)


def assert_same(a: Stored, b: Stored, tolerance: float = 0.0) -> None:
    assert a.meta == b.meta
    assert a.layers.keys() == b.layers.keys()
    for layer, mine in a.layers.items():
        theirs = b.layers[layer]
        assert replace(mine, groups=()) == replace(theirs, groups=())
        assert [type(g) for g in mine.groups] == [type(g) for g in theirs.groups]
        for x, y in zip(mine.groups, theirs.groups, strict=True):
            for f in fields(x):
                left, right = (np.asarray(getattr(g, f.name)) for g in (x, y))
                assert left.dtype == right.dtype, f.name
                np.testing.assert_allclose(left, right, rtol=tolerance, atol=0, err_msg=f.name)


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    stored = random_stats(0)
    save(tmp_path / "s.safetensors", stored)
    assert_same(load(tmp_path / "s.safetensors"), stored)
    assert load(tmp_path / "s.safetensors").groups() == {Core, Means, Gram, Sample}
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    by_layer = load(tmp_path / "s.safetensors").layers
    assert by_layer[3].need(Sample).size == 5
    assert by_layer[3].need(Core).tokens.shape == ()


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, random_stats(1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    save(file, random_stats(0))
    before = file.read_bytes()
    broken = random_stats(1)
    spoiled = broken.layers[0].having(Means(np.array([object()])))
    with pytest.raises(Exception, match=r"."):
        save(file, replace(broken, layers={0: spoiled}))
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_merging_adds_in_any_order() -> None:
    a, b, c = (random_stats(seed, shard) for seed, shard in enumerate("abc"))
    left, right, other = merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([c, a, b])
    assert_same(left, right, 1e-12)
    assert_same(left, other, 1e-12)
    count_E = np.add.reduce([s.layers[0].need(Core).n_E for s in (a, b, c)])
    assert left.layers[0].need(Core).n_E.tolist() == count_E.tolist()
    fmax = np.maximum.reduce([s.layers[0].need(Core).fmax_E for s in (a, b, c)])
    assert left.layers[0].need(Core).fmax_E.tolist() == fmax.tolist()
    keys = np.sort(np.concatenate([s.layers[3].need(Sample).key_S for s in (a, b, c)]))
    assert left.layers[3].need(Sample).key_S.tolist() == keys[:5].tolist()
    assert [part.name for part in left.meta.data] == ["a", "b", "c"]
    assert (left.meta.rows.name, left.meta.rows.rows) == ("a+b+c", 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent_sha256": "q"}, "parent_sha256 is p in one and q in the other"),
        ({"normalize": False}, "normalize is True in one and False"),
        ({"seed": 1}, "seed is 0 in one and 1"),
        ({"data": random_stats(0, "a").meta.data}, "both count the same rows"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(change: dict[str, Any], message: str) -> None:
    a, b = random_stats(0, "a"), random_stats(1, "b")
    with pytest.raises(PlanError, match=message):
        merge([a, replace(b, meta=b.meta.model_copy(update=change))])
    fewer = {i: replace(stats, groups=stats.groups[:2]) for i, stats in b.layers.items()}
    with pytest.raises(PlanError, match="different layers or groups"):
        merge([a, replace(b, layers=fewer)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent_sha256": "q"}, "of another parent checkpoint"),
        ({"data": (Rows(name="rows", rows=4, sha256="e"),)}, "of other calibration rows"),
        ({"dtype": "bfloat16"}, "dtype is float32, now it is bfloat16"),
    ],
)
def test_statistics_of_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=rf"^s.st: .*{message}.*remove it to calibrate anew"):
        refuse_other(Path("s.st"), META, META.model_copy(update=change), sampled=False)


def test_the_seed_matters_to_samples_only() -> None:
    other = META.model_copy(update={"seed": 1})
    refuse_other(Path("s.st"), META, other, sampled=False)
    with pytest.raises(PlanError, match="seed is 0, now it is 1"):
        refuse_other(Path("s.st"), META, other, sampled=True)


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    with pytest.raises(PlanError, match="is missing"):
        load(file)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(PlanError, match="holds no statistics of this version"):
        load(file)
    save(file, random_stats(0))
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(PlanError, match="is damaged"):
        load(file)
    file.write_bytes(whole.replace(b'"gram"', b'"gran"').replace(b'\\"gram\\"', b'\\"gran\\"'))
    with pytest.raises(PlanError, match="is damaged"):
        load(file)

"""The whole layer through the Triton kernels: path choice, chunks, operators for torch.compile, CUDA graphs.

Legend: T tokens, K chosen experts per token, E router rows, P physical experts, D model width, F expert inner width.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import gpu, grouped_gemm, pair, reference, tiles
from kernels.routing import SKIP, ExpertWeights, RouterPolicy, Routing

IS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if IS_CUDA else "cpu"
# Three roundings (h, y, result) on the same rounded inputs, against float64.
BOUNDS = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
HALF = torch.bfloat16 if IS_CUDA else torch.float16
P, D, F = 6, 48, 40
POLICY = RouterPolicy(top_k=2, normalize=True)
TABLES = {
    "full": (tuple(range(6)), {}),
    "slice": ((0, -1, 1, -1, 2, 3), {"slice": True}),
    "zero": ((0, -1, 1, -1, 2, 3), {}),
    "zero, survivors rescaled": ((0, -1, 1, -1, 2, 3), {"survivors": "old_sum"}),
    "tie": ((0, 0, 1, 2, 2, 3), {}),
    "constant": ((0, -2, 1, -3, 2, 3), {}),
    "all but one pruned": ((-1, -1, -1, 0, -1, -1), {}),
    "nothing left": ((-1, -1, -1, -1, -1, -1), {}),
}


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def make_experts(num_experts: int = P, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    return ExpertWeights(
        (torch.randn(num_experts, 2 * F, D) / math.sqrt(D)).to(dtype),
        (torch.randn(num_experts, D, F) / math.sqrt(F)).to(dtype),
        torch.randn(2, D).to(dtype),
    )


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def is_same(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit on a GPU; in the interpreter, numpy's products depend a little on a row's place in its tile."""
    return torch.equal(result, expected) if IS_CUDA else error(result, expected) < 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", TABLES)
def test_every_semantics_in_both_paths(name: str, tokens: int, dtype: torch.dtype) -> None:
    table, options = TABLES[name]
    policy: RouterPolicy = replace(POLICY, **options)  # type: ignore[arg-type]
    table_VE = torch.tensor([table], dtype=torch.int32)
    logits_TE, x_TD = torch.randn(tokens, 6).to(dtype), torch.randn(tokens, D).to(dtype)
    experts, residual_TD = make_experts(max(max(table) + 1, 1), dtype), torch.randn(tokens, D).to(dtype)

    routing = gpu.route(logits_TE, table_VE, policy)
    expected = reference.route(logits_TE, table_VE, policy)
    assert torch.equal(routing.slot_TK, expected.slot_TK)
    result = gpu.moe_ffn(x_TD, routing, experts, residual_TD)
    assert (
        error(result, reference.moe_ffn(x_TD, expected, experts, residual_TD, accumulate=torch.float64)) < BOUNDS[dtype]
    )
    assert torch.equal(result, gpu.moe_ffn(x_TD, routing, experts, residual_TD))
    if name == "nothing left":
        assert torch.equal(result, residual_TD)


def test_few_pairs_take_the_pair_path_and_many_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module, function in ((pair, "pair_down"), (grouped_gemm, "down")):
        original = getattr(module, function)

        def spy(*args: Any, original: Any = original, function: str = function, **kwargs: Any) -> torch.Tensor:
            called.append(function)
            result: torch.Tensor = original(*args, **kwargs)
            return result

        monkeypatch.setattr(module, function, spy)
    experts = make_experts(16)
    for tokens in (1, 2, 3):
        gpu.moe_ffn(torch.randn(tokens, D), Routing(*_full(tokens, 2, 16)), experts)
    assert called == ["pair_down", "pair_down", "down"]


def _full(tokens: int, top_k: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    slot_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]).int()
    return slot_TK, torch.rand(tokens, top_k)


def test_more_tokens_than_the_workspace_holds_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x_TD, routing = make_experts(), torch.randn(23, D), Routing(*_full(23, 2, P))
    residual_TD = torch.randn(23, D)
    expected = gpu.moe_ffn(x_TD, routing, experts, residual_TD, batch_invariant=True)
    monkeypatch.setattr(gpu, "WORKSPACE_BYTES", 8 * 2 * (F + D) * 4)  # eight tokens
    assert is_same(gpu.moe_ffn(x_TD, routing, experts, residual_TD, batch_invariant=True), expected)


def test_a_token_alone_is_the_token_in_a_batch_on_request() -> None:
    experts, x_TD, routing = make_experts(), torch.randn(30, D), Routing(*_full(30, 2, P))
    together = gpu.moe_ffn(x_TD, routing, experts, batch_invariant=True)
    for t in (0, 17, 29):
        alone = Routing(routing.slot_TK[t : t + 1], routing.weight_TK[t : t + 1])
        assert is_same(gpu.moe_ffn(x_TD[t : t + 1], alone, experts, batch_invariant=True)[0], together[t])


@pytest.mark.parametrize("architecture", tiles.TABLES)
def test_every_band_of_every_architecture_computes_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide tiles on few tokens: slow, but each shipped configuration runs once."""
    x_TD, experts = torch.randn(5, 64), ExpertWeights(torch.randn(2, 128, 64) / 8, torch.randn(2, 64, 64) / 8)
    routing = Routing(*_full(5, 1, 2))
    expected = reference.moe_ffn(x_TD, routing, experts, accumulate=torch.float64)
    for itemsize, bands in tiles.TABLES[architecture].items():
        dtype = torch.float32 if itemsize == 4 else HALF
        if IS_CUDA and architecture != gpu.limits(torch.device("cuda", 0)).architecture:
            continue
        for band in bands:
            monkeypatch.setattr(tiles, "choose", lambda *_args, band=band: band.tiles)
            weights = ExpertWeights(experts.w_in_PGD.to(dtype), experts.w_out_PDF.to(dtype))
            assert error(gpu.moe_ffn(x_TD.to(dtype), routing, weights), expected) < 2 * BOUNDS[dtype]


def test_all_operators_are_what_torch_compile_expects() -> None:
    """Schema, fake tensors, autograd registration and dynamic shapes, by torch's own checker."""
    experts, x_TD, (slot_TK, weight_TK) = make_experts(), torch.randn(5, D), _full(5, 2, P)
    torch.library.opcheck(
        torch.ops.secateur.moe_ffn,
        (
            x_TD,
            slot_TK,
            weight_TK,
            experts.w_in_PGD,
            experts.w_out_PDF,
            None,
            None,
            None,
            None,
            None,
            "silu",
            True,
            1.0,
            False,
        ),
    )
    table_VE = torch.arange(P, dtype=torch.int32)[None]
    torch.library.opcheck(torch.ops.secateur.remap, (slot_TK, weight_TK, table_VE, "keep", None))
    num_valid = torch.tensor([3], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.secateur.route,
        (torch.randn(5, P), table_VE, None, None, num_valid, None, 2, "softmax", True, 1.0, False, "keep"),
    )


def test_no_token_is_no_work() -> None:
    routing = gpu.route(torch.empty(0, P), torch.arange(P, dtype=torch.int32)[None], POLICY)
    assert routing.slot_TK.shape == (0, 2)
    assert gpu.moe_ffn(torch.empty(0, D), routing, make_experts()).shape == (0, D)


@pytest.mark.skipif(not IS_CUDA, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_a_captured_layer_replays_other_inputs_bit_for_bit(tokens: int) -> None:
    """Other logits, another number of valid tokens, nothing kept and everything kept: one graph."""
    experts = make_experts(dtype=HALF)
    table_VE = torch.arange(P, dtype=torch.int32)[None].clone()
    logits_TE, x_TD = torch.randn(tokens, P), torch.randn(tokens, D).to(HALF)
    num_valid = torch.tensor([tokens], dtype=torch.int32)

    def layer() -> torch.Tensor:
        return gpu.moe_ffn(x_TD, gpu.route(logits_TE, table_VE, POLICY, num_valid=num_valid), experts, x_TD)

    layer()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for valid in (tokens, tokens // 2, 0):
        for table in (torch.arange(P), torch.full((P,), SKIP), torch.tensor([0, -2, 1, -3, -1, 2])):
            table_VE.copy_(table)
            num_valid.fill_(valid)
            logits_TE.normal_()
            x_TD.normal_()
            eager = layer()
            for _ in range(10):
                graph.replay()
                assert torch.equal(captured, eager)

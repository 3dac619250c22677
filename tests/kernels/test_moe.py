"""The place that picks an implementation, and the rule that each fast function has a plain twin."""

import inspect

import pytest
import torch

from kernels import cpu, reference
from kernels.moe import BACKENDS, FASTEST_FOR_DEVICE, select_backend


def public_functions(module: object) -> dict[str, inspect.Signature]:
    functions = inspect.getmembers(module, inspect.isfunction)
    name = getattr(module, "__name__", "")
    return {n: inspect.signature(f) for n, f in functions if not n.startswith("_") and f.__module__ == name}


def test_each_fast_function_has_a_twin_with_the_same_leading_arguments() -> None:
    twins = public_functions(reference)
    fast = public_functions(cpu)
    assert {"route", "moe_ffn"} <= set(fast)
    for name, signature in fast.items():
        assert name in twins, f"kernels.cpu.{name} has no twin in kernels.reference"
        ours, theirs = list(signature.parameters.values()), list(twins[name].parameters.values())
        assert ours == theirs[: len(ours)], name
        assert all(extra.default is not inspect.Parameter.empty for extra in theirs[len(ours) :]), name
        assert signature.return_annotation == twins[name].return_annotation, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [0, 1, 3, 65])
def test_a_matrix_product_with_and_without_bias(rows: int, dtype: torch.dtype, bound: float) -> None:
    x, w_ND, bias_N = (torch.randn(size).to(dtype) for size in ((2, rows, 97), (47, 97), (47,)))
    strided = torch.randn(2, 97, rows).to(dtype).transpose(1, 2)
    for left in (x, strided):
        for bias in (None, bias_N):
            expected = left.double() @ w_ND.double().t() + (0 if bias is None else bias.double())
            for module in (cpu, reference):
                with torch.no_grad():
                    result = module.linear(left, w_ND, bias)
                assert result.dtype == dtype
                assert result.shape == (2, rows, 47)
                assert float((result.double() - expected).norm()) <= bound * float(expected.norm())


def test_a_product_without_onednn_is_torchs_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator that is gone, or that gives something else, is reported once and not used."""

    def gone(*args: object) -> torch.Tensor:
        raise RuntimeError("no such operator")

    for broken in (gone, lambda x, w, *rest: x @ w.t() + 1):
        cpu._onednn_dtypes.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", broken)
        caplog.clear()
        x, w_ND = torch.randn(3, 16), torch.randn(5, 16)
        with torch.no_grad():
            assert torch.equal(cpu.linear(x, w_ND), torch.nn.functional.linear(x, w_ND))
            cpu.linear(x, w_ND)
        assert [record.name for record in caplog.records] == ["secateur.kernels"] * 2  # one for each dtype
    monkeypatch.undo()
    cpu._onednn_dtypes.cache_clear()


def test_products_keep_gradients() -> None:
    w_ND = torch.randn(5, 16, requires_grad=True)
    assert cpu.linear(torch.randn(3, 16), w_ND).requires_grad


def test_a_cpu_gets_the_cpu_path_and_an_unknown_device_the_reference() -> None:
    assert select_backend(torch.device("cpu")).name == "cpu"
    assert select_backend(torch.device("meta")).name == "reference"


def test_a_backend_can_be_forced() -> None:
    assert select_backend(torch.device("cpu"), "reference").moe_ffn is reference.moe_ffn


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"backend is 'fast', must be one of \['cpu', 'reference'"):
        select_backend(torch.device("cpu"), "fast")


def test_backends_are_named_as_they_are_listed() -> None:
    assert all(backend.name == name for name, backend in BACKENDS.items())
    assert set(FASTEST_FOR_DEVICE.values()) <= set(BACKENDS)

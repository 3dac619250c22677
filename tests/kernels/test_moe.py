"""The place that picks an implementation, and the rule that each fast function has a plain twin."""

import inspect
import logging
import subprocess
import sys
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from kernels import cpu, reference
from kernels.moe import BACKENDS, FASTEST_FOR_DEVICE, _log_choice, select_backend

CUDA = torch.device("cuda:0")


def public_functions(module: object) -> dict[str, inspect.Signature]:
    functions = inspect.getmembers(module, inspect.isfunction)
    name = getattr(module, "__name__", "")
    return {n: inspect.signature(f) for n, f in functions if not n.startswith("_") and f.__module__ == name}


@pytest.mark.parametrize("name", ["cpu", "gpu", "route", "sort", "combine"])
def test_each_fast_function_has_a_twin_with_the_same_leading_arguments(name: str) -> None:
    """What differs (a dtype to accumulate in, a choice of tiles) comes last and is optional."""
    if name != "cpu":
        pytest.importorskip("triton")
    twins, fast = public_functions(reference), public_functions(import_module(f"kernels.{name}"))
    assert fast
    for function, signature in fast.items():
        assert function in twins, f"kernels.{name}.{function} has no twin in kernels.reference"
        ours, theirs = (list(s.parameters.values()) for s in (signature, twins[function]))
        shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
        own = ours[len(shared) :] + theirs[len(shared) :]
        assert all(parameter.default is not inspect.Parameter.empty for parameter in own), function
        assert not {parameter.name for parameter in ours} & {parameter.name for parameter in theirs[len(shared) :]}
        assert signature.return_annotation == twins[function].return_annotation, function


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


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of choices, none of which has been made before."""
    _log_choice.cache_clear()
    caplog.set_level(logging.INFO, "secateur.kernels")
    return caplog


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


def pretend_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)


def test_a_cpu_gets_the_cpu_path_and_an_unknown_device_the_reference() -> None:
    assert select_backend(torch.device("cpu")).name == "cpu"
    assert select_backend(torch.device("meta")).name == "reference"


def test_a_gpu_gets_triton_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("triton")
    pretend_gpu(monkeypatch)
    for _ in range(3):
        assert select_backend(CUDA).name == "triton"
    assert log.messages == [f"experts on cuda:0 (NVIDIA H100, sm_90) run through triton {triton.__version__}"]


def test_each_choice_is_logged_once(log: pytest.LogCaptureFixture) -> None:
    for name in (None, "reference", "cpu", None):
        select_backend(torch.device("cpu"), name)
    select_backend(torch.device("meta"))
    cpu_name = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    assert log.messages == [f"experts on {cpu_name} run through {name}" for name in ("cpu", "reference")]


def test_a_card_that_is_too_old_gets_the_reference_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    for _ in range(2):
        assert select_backend(CUDA).name == "reference"
    warning, choice = log.records
    assert (warning.levelname, choice.levelname) == ("WARNING", "INFO")
    assert "cuda:0 (NVIDIA H100, sm_75) is too old, sm_80 (A100, 2020) or newer is needed" in warning.message
    assert choice.message == "experts on cuda:0 (NVIDIA H100, sm_75) run through reference"
    with pytest.raises(ValueError, match=r"backend triton cannot run on cuda:0: .* too old"):
        select_backend(CUDA, "triton")


def test_without_triton_a_gpu_gets_the_reference_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch)
    pretend_without_triton(monkeypatch)
    assert select_backend(CUDA).name == "reference"
    assert "no triton on cuda:0: triton cannot be imported" in log.messages[0]
    assert "install the extra `gpu`" in log.messages[0]
    with pytest.raises(ValueError, match=r"backend triton cannot run on cuda:0: .* install the extra `gpu`"):
        select_backend(CUDA, "triton")


def test_triton_on_a_cpu_is_for_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert select_backend(torch.device("cpu"), "triton").name == "triton"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f"backend triton cannot run on {device}: it needs a CUDA device"):
            select_backend(torch.device(device), "triton")


def test_a_named_backend_is_held_against_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend cpu cannot run on cuda:0: it computes on the CPU only"):
        select_backend(CUDA, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend triton cannot run on cuda:0: torch sees no CUDA device"):
        select_backend(CUDA, "triton")


def test_a_backend_can_be_forced() -> None:
    assert select_backend(torch.device("cpu"), "reference").moe_ffn is reference.moe_ffn


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"backend is 'fast', must be one of \['cpu', 'reference', 'triton'\]"):
        select_backend(torch.device("cpu"), "fast")


def test_backends_are_named_as_they_are_listed_and_loaded_once() -> None:
    assert set(FASTEST_FOR_DEVICE.values()) <= set(BACKENDS)
    for name, load in BACKENDS.items():
        if name == "triton":
            pytest.importorskip("triton")
        assert load().name == name
        assert load() is load()


def test_nothing_imports_triton_before_it_is_chosen() -> None:
    """A service on a CPU starts without it, installed or not."""
    code = "import sys, torch, service.app; from kernels.moe import select_backend as s; s(torch.device('cpu'))"
    check = "; assert not {'triton', 'kernels.gpu'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=Path(__file__).parents[2])

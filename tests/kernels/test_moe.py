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

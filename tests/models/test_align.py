"""Neurons in any order: found again, moved together, and the function stays."""

import numpy as np
import pytest
import torch

from kernels.reference import expert_in, expert_out
from models.pruning.align import matching, permuted


@pytest.mark.parametrize("gated", [True, False])
def test_a_permutation_is_found_and_undone(gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w_in, w_out = (torch.randn(size, generator=generator) for size in ((24 if gated else 12, 16), (16, 12)))
    shuffle = torch.randperm(12, generator=generator)
    other_in, other_out = permuted(w_in, w_out, shuffle.numpy())
    assert not torch.equal(other_in, w_in)
    x = torch.randn(5, 16, generator=generator)
    outputs = [expert_out(expert_in(x, a, None, "silu", gated), b) for a, b in ((w_in, w_out), (other_in, other_out))]
    torch.testing.assert_close(*outputs)
    neuron_F = matching(other_in, other_out, w_in, w_out)
    assert shuffle[torch.from_numpy(neuron_F)].tolist() == list(range(12))
    for back, original in zip(permuted(other_in, other_out, neuron_F), (w_in, w_out), strict=True):
        assert torch.equal(back, original)


def test_gate_up_and_down_decide_together() -> None:
    """Two neurons, one input: by its gate alone neuron 0 fits place 0 (1 + 1 against 0), by its up row too, but the
    down columns say 5 + 5 for the swap."""
    gate, up, down = ([1.0, 0.0], [1.0, 0.0], [[0.0, 5.0]])
    reference_in, reference_out = torch.tensor([*gate, *up]).view(4, 1), torch.tensor(down)
    w_in, w_out = torch.tensor([*gate, *up]).view(4, 1), torch.tensor([[5.0, 0.0]])
    # kept order: 1 + 1 + 0; swapped: 0 + 0 + 25
    assert matching(w_in, w_out, reference_in, reference_out).tolist() == [1, 0]
    assert matching(w_in, w_out / 25, reference_in, reference_out).tolist() == [0, 1]


def test_each_neuron_is_used_once() -> None:
    w_in, w_out = torch.ones(6, 2), torch.ones(2, 3)
    assert sorted(matching(w_in, w_out, w_in, w_out).tolist()) == [0, 1, 2]
    assert permuted(w_in, w_out, np.array([2, 0, 1]))[1].shape == (2, 3)

"""What one MoE layer must at least move and compute, and what that costs on a card: pure arithmetic.

T tokens, K chosen experts per token, P physical experts, D model width, F expert inner width. A layer's floor is the
larger of bytes / bandwidth and flops / peak: every expert that has a token is read once, x is read and the output
written once, nothing else touches memory. Two GEMM launches move more (they write and read the inner rows h and the
experts' outputs y); `two_launch_bytes` counts that too, as the highest share of the floor such kernels can reach.
"""

from dataclasses import dataclass

ELEMENT_BYTES = 2  # bfloat16 or float16


@dataclass(frozen=True)
class Peaks:
    """What a card can do: bytes per second and floating-point operations per second."""

    bandwidth: float
    flops: float


# NVIDIA's data sheet for the H100 80 GB HBM3, and the dense bf16 rate that its power limit leaves in practice.
H100 = Peaks(bandwidth=3.35e12, flops=790e12)


@dataclass(frozen=True)
class LayerSize:
    """One layer's experts. matrices: 3 if gated, 2 if not. shared: experts that every token runs, beside its K."""

    width: int
    inner: int
    matrices: int
    shared: int = 0

    @property
    def expert_bytes(self) -> int:
        return self.matrices * self.width * self.inner * ELEMENT_BYTES


@dataclass(frozen=True)
class Work:
    """One call's least work; pairs are those that run a routed expert, shared experts not counted."""

    tokens: int
    pairs: float
    bytes: float
    two_launch_bytes: float
    flops: float


def work(size: LayerSize, tokens: int, active: float, pairs: float) -> Work:
    """active: experts with at least one token. pairs: (token, expert) pairs that run, kept share times T * K."""
    rows = pairs + tokens * size.shared
    moved = (active + size.shared) * size.expert_bytes + 2 * tokens * size.width * ELEMENT_BYTES
    intermediates = 2 * rows * (size.inner + size.width) * ELEMENT_BYTES
    return Work(tokens, pairs, moved, moved + intermediates, 2.0 * rows * size.matrices * size.width * size.inner)


def expected_active(num_experts: int, rows: int, top_k: int, tokens: int) -> float:
    """Experts with at least one token if every token picks K of `rows` router rows uniformly; num_experts survive."""
    return float(num_experts * (1 - (1 - top_k / rows) ** tokens))


def memory_seconds(work: Work, peaks: Peaks) -> float:
    return work.bytes / peaks.bandwidth


def compute_seconds(work: Work, peaks: Peaks) -> float:
    return work.flops / peaks.flops


def floor_seconds(work: Work, peaks: Peaks) -> float:
    return max(memory_seconds(work, peaks), compute_seconds(work, peaks))


def two_launch_seconds(work: Work, copy: Peaks) -> float:
    """The floor of two GEMM launches at the bandwidth that a copy reaches."""
    return max(work.two_launch_bytes / copy.bandwidth, compute_seconds(work, copy))


def bound(work: Work, peaks: Peaks) -> str:
    """ "memory" or "compute", whichever the floor comes from."""
    return "memory" if memory_seconds(work, peaks) >= compute_seconds(work, peaks) else "compute"

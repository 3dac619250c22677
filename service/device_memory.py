"""What the device says about its memory. A CPU has no allocator to ask, so there its gauges are absent, not 0."""

import gc
from collections.abc import Iterable

import torch

from service.metrics import Metrics


def allocated_bytes(device: str) -> int | None:
    """Bytes in live tensors by the CUDA allocator, once garbage is gone and kernels have ended; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def publish_device_memory(metrics: Metrics, devices: Iterable[torch.device]) -> None:
    """Set the gauges of every CUDA device that holds a model."""
    for device in devices:
        if device.type != "cuda":
            continue
        metrics.set("device_memory_allocated_bytes", torch.cuda.memory_allocated(device), device=device)
        metrics.set("device_memory_reserved_bytes", torch.cuda.memory_reserved(device), device=device)
        metrics.set("device_memory_peak_bytes", torch.cuda.max_memory_allocated(device), device=device)
        metrics.set("device_memory_total_bytes", torch.cuda.get_device_properties(device).total_memory, device=device)

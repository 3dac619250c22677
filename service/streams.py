"""The CUDA stream of a lane: where both have kernels waiting, the device takes the primary's first."""

from contextlib import AbstractContextManager, nullcontext

import torch

# CUDA's default stream has the lowest priority there is, so it is the primary that leaves it. Lower numbers go first.
PRIMARY, SHADOW = -1, 0


class Stream:
    """A stream of one priority on each device that asks for it; one thread uses it. Other devices have none."""

    def __init__(self, priority: int) -> None:
        self._priority = priority
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        """Work that is launched inside goes to this lane's stream of the device."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            stream = torch.cuda.Stream(device, priority=self._priority)  # type: ignore[no-untyped-call]
            self._streams[device] = stream
        return torch.cuda.stream(self._streams[device])

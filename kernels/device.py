"""What a launch plan needs to know of a GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A GPU, or what stands for one where kernels are interpreted.

    Attributes:
        arch: 80 for sm_80 and so on; 0 for ROCm, and where there is no GPU.
        processors: streaming multiprocessors, or compute units.
    """

    arch: int
    processors: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what is known of `device`."""
    if device.type != "cuda":
        return Device(0, 2)
    properties = torch.cuda.get_device_properties(device)
    arch = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count)

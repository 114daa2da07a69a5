"""The energy that a piece of work took, as the machine's own counters have it.

An NVIDIA GPU counts its millijoules (NVML), an Intel or AMD processor its microjoules (RAPL, which Linux
shows under /sys/class/powercap, on many machines to root alone). Both count all that runs on the device,
idle power included. NVML is read by NVIDIA's own binding. The libraries that wrap both bring more than
this needs: codecarbon samples watts and asks the network where it is, zeus wants a dozen packages more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


def meter(device: str | None) -> Callable[[], tuple[float | None, str | None]]:
    """Begins to measure; the call that it returns gives the joules since, and how they were measured.

    Both are None where the machine does not say: no guess is made.

    Parameters
    ----------
    device : "cuda", "cuda:1", "cpu", … as torch names it
    """
    read, method = _counter(str(device or "cpu"))
    before = read()

    def used() -> tuple[float | None, str | None]:
        after = read()
        if before is None or after is None or before.keys() != after.keys():
            return None, None
        # a counter that began again from 0 wrapped at its range
        joules = sum(
            value - before[name][0] + (limit if value < before[name][0] else 0)
            for name, (value, limit) in after.items()
        )
        return joules, method

    return used


_Reading = dict[str, tuple[float, float]] | None  # joules of each counter, and where it wraps


@functools.cache
def _counter(device: str) -> tuple[Callable[[], _Reading], str | None]:
    if device.startswith("cuda"):
        return _nvml(device) or (lambda: None, None)
    zones = sorted(zone for zone in _POWERCAP.glob("*-rapl:*") if zone.name.count(":") == 1)
    return functools.partial(_rapl, zones), f"RAPL, {len(zones)} packages"


def _rapl(zones: list[Path]) -> _Reading:
    try:
        return {
            zone.name: (
                int((zone / "energy_uj").read_text()) / 1e6,
                int((zone / "max_energy_range_uj").read_text()) / 1e6,
            )
            for zone in zones
        } or None
    except (OSError, ValueError):  # not to be read by this user
        return None


def _nvml(device: str) -> tuple[Callable[[], _Reading], str] | None:
    try:
        import pynvml
        import torch

        properties = torch.cuda.get_device_properties(device)
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no binding, no driver, or a GPU that does not count: each raises its own
        return None

    def read() -> _Reading:
        try:
            return {"GPU": (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)}
        except pynvml.NVMLError:
            return None

    return read, f"NVML, {properties.name}"

"""The memory that is free, and the most that a piece of work held at once."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from vdcompress.memory import give_back

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


def free_memory(device: str) -> int:
    """Return the bytes that are free on a device, as its driver or the system says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


class PeakMemory:
    """Watches how much memory a device's tensors take above what was held at the start.

    On CUDA it is what torch allocated. On CPU it is the process's resident memory, whose peak only
    Linux lets be set back; elsewhere, and on other devices, it is not known.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_cuda = device.startswith("cuda")
        give_back()
        self.before = torch.cuda.memory_allocated(device) if self.on_cuda else None
        if device == "cpu":
            self.before = _status("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far; what is held now stays part of it, what was freed does not."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        give_back()
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            self.before = None

    def above_start(self) -> int | None:
        """Return the most bytes held since :meth:`restart` beyond those of the start."""
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.on_cuda else _status("VmHWM")
        return None if peak is None else max(0, peak - self.before)


def _status(name: str) -> int | None:
    """Return a size from what Linux says of this process, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found.split()[1]) * 1024

"""Peak memory of one call beyond what was there before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(call: Callable[[], Any], device: str) -> float | None:
    """MB that a warmed-up call needs at its peak, its outputs included.

    CUDA: of PyTorch's allocator. CPU (Linux): the resident set's high-water mark, reset by the
    kernel before the call, after the allocator gave its free pages back: native code's buffers and
    those of other libraries count as well. None where the system does not tell.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not _reset_high_water():
        return None
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before) * 1.024e-3  # kiB


def _reset_high_water() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(key: str) -> int:
    """An entry of this process in /proc, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))

"""Peak memory of one call beyond what was there before it.

python benchmarks/memory.py OP PROVIDER N=16384,D=512,... prints that of forward and backward.
"""

import argparse
import ctypes
import gc
import importlib
import subprocess
import sys
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


def peak_alone(op: str, provider: str, shape: dict[str, Any], device: str) -> dict:
    """A row: `peak_memory` in a new process, where nothing is left of what other providers did.

    The call before it, which loads libraries and starts threads, is of the quick shape.
    """
    row = {**shape, "provider": provider}
    text = ",".join(f"{key}={value}" for key, value in shape.items())
    command = [sys.executable, __file__, op, provider, text, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = done.stdout.strip()
    try:
        return row | {"peak_mb": float(answer)}
    except ValueError:
        why = answer or (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return row | {"error" if done.returncode else "skipped": why}


def main(argv: list[str] | None = None) -> None:
    common = importlib.import_module("common")  # which imports this module
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("op", "provider", "shape"):
        flags.add_argument(name)
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = flags.parse_args(argv)
    script = importlib.import_module(f"bench_{args.op}")
    quick = script.SHAPES["quick"][0]
    shape = common.parse_shape(args.shape, quick)
    for sizes in (quick | {"dtype": shape["dtype"]}, shape):
        case = script.case(sizes, common.DTYPES[shape["dtype"]], args.device)
        provider = case.providers[args.provider]
        if isinstance(provider, str):
            print(provider)
            return
        call = common.calls(provider, case.inputs)["forward_backward"]
        if sizes is not shape:
            call()
    print(peak_memory(call, args.device))


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


if __name__ == "__main__":
    main()

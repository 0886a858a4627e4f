"""Which backend runs an op, and what every room shares: checks and dtypes.

reference   the formula, in plain PyTorch: any device, any dtype, any order of derivative
cpu         vendor GEMM and the C++ kernels of fastxm._C
cuda        vendor GEMM and the CUDA kernels of fastxm._C
triton      the Triton kernels of fastxm.kernels
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastxm import _C

BACKENDS = ("reference", "cpu", "cuda", "triton")
# innermost last; of the whole process, for autograd has threads of its own for CUDA tensors
forced: list[str] = []
# op -> the backend that it ran on last, for `fastxm doctor`
last: dict[str, str] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend on the whole process (tests, benchmarks, debugging).

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: name is no backend.
        RuntimeError: the backend was not built, or the machine cannot run it; raised here or, for
            tensors of another device, by the op.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {name!r}")
    if reason := missing(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    forced.append(name)
    try:
        yield
    finally:
        forced.pop()


def build_info() -> dict[str, object]:
    """What fastxm._C was made of, and the instruction set that it uses here."""
    return dict(_C.build_info())


def missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    if name == "cuda" and not _C.build_info()["cuda"]:
        return "fastxm was built without CUDA (install with nvcc on PATH)"
    if name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if name == "triton" and not (torch.cuda.is_available() or interpreting()):
        return "no CUDA device"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (tests without a GPU)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(op: str, device: torch.device, auto: str, offered: Sequence[str] = BACKENDS) -> str:
    """The backend that runs: the forced one if it can take tensors of this device, else `auto`.

    Args:
        op: the op's name, for the error.
        device: where the inputs are.
        auto: the op's own choice, from its measured table.
        offered: the backends that the op has.

    Raises:
        NotImplementedError: the forced backend does not exist for this op or device; says which do.
    """
    name = forced[-1] if forced else auto
    last[op] = name
    if not forced:
        return auto
    runs_on = {"reference": None, "cpu": "cpu", "cuda": "cuda", "triton": "cuda"}[name]
    if name == "triton" and interpreting():
        runs_on = None
    if name not in offered or (runs_on is not None and device.type != runs_on):
        there = f"{device.type} tensors, of {', '.join(offered)}"
        raise NotImplementedError(f"{op} has no {name} backend for {there}")
    return name


def one_device(op: str, *tensors: Tensor | None) -> None:
    """Raises TypeError where an op's tensors are of several devices."""
    if len(names := {str(t.device): None for t in tensors if t is not None}) > 1:
        raise TypeError(f"{op} needs its tensors on one device, not on {' and '.join(names)}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of statistics: float64 if a tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of statistics."""
    return tuple(t.to(wide_dtype(*tensors)) for t in tensors)


def unit_rows(x: Tensor) -> Tensor:
    """Rows (the last dimension) divided by their L2 norms, x * rsqrt(max(sum x^2, 1e-12)), wide."""
    (x,) = wide(x)
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def threads() -> int:
    """How many threads C++ kernels use: as many as PyTorch."""
    return torch.get_num_threads()


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for x's device."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()

"""How tests compare: against float64, in units of what plain PyTorch itself gets wrong."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastxm.ops import gemm

ROOT = Path(__file__).parents[1]
WHERE = ["emulated", *(["gpu"] if torch.cuda.is_available() else [])]  # CUDA kernels run


def emulated(name: str, folder: Path) -> ctypes.CDLL:
    """The CUDA kernels of tests/native/<name>.cpp, built into a folder to run on the CPU."""
    library, native = folder / f"{name}.so", ROOT / "tests/native"
    # indices beyond an array and misaligned vectors end the process
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC", *checks,
               "-Wno-unknown-pragmas", f"-I{native}", f"-I{ROOT / 'csrc'}",
               str(native / f"{name}.cpp"), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def products_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the products and the streams of a CPU's tensors be as those of a GPU's, for `emulated`
    kernels."""

    def multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
        out.copy_(x.to(out.dtype) @ y.to(out.dtype))

    def accumulate(out: Tensor, x: Tensor, y: Tensor) -> None:
        out += x.to(out.dtype) @ y.to(out.dtype)

    monkeypatch.setattr(gemm, "stream", lambda x: 0)
    monkeypatch.setattr(gemm, "PACKED", gemm.HALVES)
    monkeypatch.setattr(gemm, "pack", lambda y: None)
    monkeypatch.setattr(gemm, "multiply", multiply)
    monkeypatch.setattr(gemm, "accumulate", accumulate)


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a result that is a tensor, or a tuple or list of them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value if item is not None for t in flatten(item)]


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def no_worse(
    ours: Callable[..., Any],
    formula: Callable[..., Any],
    *inputs: Any,
    factor: float = 2.0,
    of_draws: bool = False,
) -> None:
    """Asserts error(ours) <= factor * error(formula) + one rounding, both against float64.

    Args:
        ours: the op under test.
        formula: the same mathematics in plain PyTorch, written independently of the op.
        *inputs: arguments of both; floating tensors are widened to float64 for the truth.
        factor: how many times plain PyTorch's own largest error is allowed.
        of_draws: outputs are [draws, ...], and largest means the root mean square of each draw's
            largest: that of one small draw is right or wrong by luck.
    """

    def largest(x: Tensor) -> Tensor:
        return x.flatten(1).abs().amax(1).square().mean().sqrt() if of_draws else x.abs().max()

    truths = flatten(formula(*[cast(x, torch.float64) for x in inputs]))
    results = flatten(ours(*inputs))
    plains = flatten(formula(*inputs))
    assert len(results) == len(truths) == len(plains)
    for i, (truth, result, plain) in enumerate(zip(truths, results, plains)):
        assert result.shape == truth.shape, f"output {i}: {result.shape}, not {truth.shape}"
        assert torch.equal(result.isfinite(), truth.isfinite()), f"output {i}: not finite alike"
        finite = truth.isfinite()
        if not finite.any():
            continue
        eps = torch.finfo(result.dtype).eps
        truth, result, plain = (x.double().where(finite, 0) for x in (truth, result, plain))
        allowed = factor * largest(plain - truth) + eps * largest(truth)
        error = largest(result - truth)
        assert error <= allowed, f"output {i}: error {error:.3e}, allowed {allowed:.3e}"


def gradient(f: Callable[..., Any], wrt: Sequence[int] = (0, 1)) -> Callable[..., list[Tensor]]:
    """The function that maps inputs to the gradients of f, with fixed random cotangents.

    Args:
        f: returns a tensor or a tuple of tensors.
        wrt: positions of the inputs to differentiate.
    """

    def gradients(*inputs: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(i in wrt) if isinstance(x, Tensor) else x
                  for i, x in enumerate(inputs)]  # fmt: skip
        outputs = flatten(f(*leaves))
        total = outputs[0].new_zeros(())
        for k, out in enumerate(outputs):
            generator = torch.Generator().manual_seed(1234 + k)
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out * weight.to(out)).sum()
        return list(torch.autograd.grad(total, [leaves[i] for i in wrt]))

    return gradients


def peak_bytes(call: Callable[[], Any]) -> Tensor:
    """Most bytes of CPU tensors at once, of those that the call makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes = torch.tensor([nbytes for _, nbytes in sorted(changes)])
    return changes.cumsum(0).max()

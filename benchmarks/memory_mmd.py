"""Peak memory of MMD and what stands around it: python benchmarks/memory_mmd.py --help

In a process of its own, whose whole resident memory is told: PyTorch, inputs, gradients and all.
"""

import argparse
import json
import time

import torch
from memory import status
from torch import Tensor

from fastxm.ops import median_heuristic, mmd2, mmd2_and_variance, mmd_permutation_test
from fastxm.ops.mmd import RBF


def with_gradients(x: Tensor, y: Tensor) -> Tensor:
    loss = mmd2(x, y)
    loss.backward()
    return loss


def variance(x: Tensor, y: Tensor) -> Tensor:
    found = mmd2_and_variance(x, y, RBF(8.0))[1]
    found.backward()
    return found


CALLS = {  # and the rows of each sample
    "mmd2": (with_gradients, 50_000),
    "variance": (variance, 20_000),
    "median": (median_heuristic, 20_000),
    "permutations": (lambda x, y: mmd_permutation_test(x, y, RBF(8.0))[1], 5_000),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("what", nargs="?", choices=CALLS, default="mmd2")
    flags.add_argument("--rows", type=int, help="of each sample")
    flags.add_argument("--features", type=int, default=64)
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = flags.parse_args()
    torch.manual_seed(0)
    call, rows = CALLS[args.what]
    args.rows = args.rows or rows
    dtype = getattr(torch, args.dtype)
    x, y = (torch.randn(args.rows, args.features).to(dtype).requires_grad_() for _ in range(2))
    before = status("VmRSS")
    start = time.perf_counter()
    result = call(x, y)
    seconds = time.perf_counter() - start
    found = {
        **vars(args),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "before_mb": round(before * 1.024e-3, 1),
        "peak_mb": round(status("VmHWM") * 1.024e-3, 1),
        "result": result.item(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

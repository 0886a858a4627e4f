"""Peak memory of one large MMD with its gradients: python benchmarks/memory_mmd.py --help

In a process of its own, whose whole resident memory is told: PyTorch, inputs, gradients and all.
"""

import argparse
import json
import time

import torch
from memory import status

from fastxm.ops import mmd2


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=50_000, help="of each sample")
    flags.add_argument("--features", type=int, default=64)
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = flags.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    x, y = (torch.randn(args.rows, args.features).to(dtype).requires_grad_() for _ in range(2))
    before = status("VmRSS")
    start = time.perf_counter()
    loss = mmd2(x, y)
    loss.backward()
    seconds = time.perf_counter() - start
    found = {
        **vars(args),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "before_mb": round(before * 1.024e-3, 1),
        "peak_mb": round(status("VmHWM") * 1.024e-3, 1),
        "mmd2": loss.item(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

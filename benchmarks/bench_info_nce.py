"""InfoNCE, symmetric, with a learned scale: python benchmarks/bench_info_nce.py --help"""

import math
import os
from functools import partial

import torch
from common import Case, Provider, Shape, compiled, main, ours, peer, wide
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastxm.ops import info_nce
from fastxm.ops.info_nce_op import store
from fastxm.ops.siglip import siglip

SHAPES = {
    "cpu": [
        {"N": 256, "D": 512, "dtype": "float32"},
        *({"N": n, "D": 512, "dtype": "float32"} for n in (512, 1024, 2048, 4096, 8192, 16384)),
        *({"N": n, "D": 512, "dtype": "bfloat16"} for n in (512, 1024, 4096, 8192, 16384)),
        {"N": 2048, "D": 128, "dtype": "float32"},
        {"N": 2048, "D": 256, "dtype": "float32"},
        {"N": 2048, "D": 256, "dtype": "bfloat16"},
    ],
    "cuda": [
        {"N": 32768, "D": 512, "dtype": "bfloat16"},
        {"N": 32768, "D": 1024, "dtype": "bfloat16"},
        {"N": 4096, "D": 512, "dtype": "bfloat16"},
        {"N": 8192, "D": 512, "dtype": "float32"},
        {"N": 65536, "D": 768, "dtype": "bfloat16"},
    ],
    "quick": [{"N": 64, "D": 64, "dtype": "float32"}],
}
SMALL = {"N": 128}  # where providers are compared with float64
ALONE = {
    "cpu": [
        (name, {"N": 16384, "D": 512, "dtype": dtype})
        for dtype in ("float32", "bfloat16")
        for name in ("fastxm", "eager")
    ],
    "cuda": [("fastxm", {"N": 32768, "D": 512, "dtype": "bfloat16"})],
    "quick": [("fastxm", {"N": 512, "D": 64, "dtype": "float32"})],
}
SCALE = 1 / 0.07
BIAS = -10.0  # of the sigmoid loss
ROWS = 512  # of a block, in the chunked form
MOST_PAIRS = 256  # pytorch-metric-learning compares every positive with every negative: N^3
# on a CPU: rows at which one call takes seconds
LONG = {"eager": 8192, "fastxm stored": 8192, "compiled": 4096, "open_clip": 4096,
        "chunked checkpoint": 4096,
        "info-nce-pytorch": 4096, "cut-cross-entropy": 4096, "fastxm siglip": 4096,
        "fastxm reference": 1024}  # fmt: skip
# matrices [N, N] of float32 that plain PyTorch holds at once
MATRICES = {"eager": 4.2, "compiled": 4.2, "open_clip": 4.3, "info-nce-pytorch": 4.6}


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """One product, both directions of it: the fastest plain form."""
    logits = wide(scale.to(x.dtype) * x @ y.T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def renormalised(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return eager(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)


def nt_xent(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    logits = wide(scale.to(x.dtype) * z @ z.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(x)))


def sigmoid(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(wide(signs * (scale.to(x.dtype) * x @ y.T + BIAS))).sum() / len(x)


def open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As in open_clip.ClipLoss on one device: a product for each direction."""
    labels = torch.arange(len(x), device=x.device)
    of_images, of_texts = scale.to(x.dtype) * x @ y.T, scale.to(x.dtype) * y @ x.T
    return (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2


def chunked(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Blocks of rows under torch.utils.checkpoint: O(N D) memory in plain PyTorch."""

    def block(a: Tensor, b: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(a), device=a.device)
        logits = wide(scale.to(a.dtype) * a @ b.T)
        return F.cross_entropy(logits, labels, reduction="sum")

    total = torch.zeros((), device=x.device)
    for first in range(0, len(x), ROWS):
        for a, b in ((x, y), (y, x)):
            total = total + checkpoint(
                block, a[first : first + ROWS], b, first, use_reentrant=False
            )
    return total / (2 * len(x))


def two_sided(one_sided):
    return lambda x, y, scale: (one_sided(x, y, scale) + one_sided(y, x, scale)) / 2


def cut_cross_entropy(package, device: str):
    impl = "cce" if device == "cuda" else "torch_compile"
    labels = lambda x: torch.arange(len(x), device=x.device)  # noqa: E731
    return two_sided(
        lambda x, y, scale: package.linear_cross_entropy(
            scale.to(x.dtype) * x, y, labels(x), impl=impl
        )
    )


def liger(package):
    loss = package.LigerFusedLinearCrossEntropyLoss()
    return two_sided(
        lambda x, y, scale: loss(y, scale.to(x.dtype) * x, torch.arange(len(x), device=x.device))
    )


def metric_learning(losses):
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=1 / SCALE))
    return lambda x, y, scale: loss(x, y)


def memeff(package):
    loss = package.MemoryEfficientCLIPLoss(
        temperature=1 / SCALE, normalized_inputs=True, stable=False
    )
    return lambda x, y, scale: loss(x, y)


def siglip_kernel(package):
    temperature = math.log(SCALE)

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        bias = torch.tensor(BIAS, device=x.device)
        return package.fused_siglip_loss(x, y, torch.tensor(temperature, device=x.device), bias)

    return run


def peers(n: int, device: str) -> dict:
    return {
        "open_clip": open_clip,
        "chunked checkpoint": chunked,
        "info-nce-pytorch": peer(
            "info_nce",
            lambda p: two_sided(lambda x, y, scale: p.info_nce(x, y, temperature=1 / SCALE)),
        ),
        "pytorch-metric-learning": f"needs N <= {MOST_PAIRS}: memory grows as N^3"
        if n > MOST_PAIRS
        else peer("pytorch_metric_learning.losses", metric_learning),
        "cut-cross-entropy": peer("cut_cross_entropy", lambda p: cut_cross_entropy(p, device)),
        "memeff": peer("memeff", memeff, cuda_on=device),
        "inf-cl": peer(
            "inf_cl",
            lambda p: two_sided(lambda x, y, scale: p.cal_inf_loss(x, y, scale=scale)),
            cuda_on=device,
        ),
        "siglip-kernel": peer("siglip_kernel", siglip_kernel, cuda_on=device),
        "liger-kernel": peer("liger_kernel.transformers", liger, cuda_on=device),
    }


def forms(x: Tensor, y: Tensor) -> dict[str, Provider | str]:
    """Ours with the products kept for the backward, and with none kept."""
    default = store(x, y, info_nce.__kwdefaults__["stored_bytes"])
    same = "this is what fastxm chooses here"
    never = "products are made again on this device"
    everything = partial(info_nce, stored_bytes=1 << 62)
    return {
        "fastxm recomputed": partial(info_nce, stored_bytes=0) if default else same,
        "fastxm stored": same if default else everything if store(x, y, 1 << 62) else never,
    }


def too_much(name: str, n: int, device: str) -> str | None:
    """Why a provider is left out on a CPU, which has no allocator that would refuse."""
    if device != "cpu":
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = 4 * n * n * MATRICES.get(name, 0)
    if need > memory / 2:
        return f"needs some {need / 1e9:.0f} GB, more than half of the memory"
    return None


def too_long(name: str, n: int, device: str) -> str | None:
    if device == "cpu" and n > LONG.get(name, n):
        return f"not timed beyond N = {LONG[name]}, to keep the run short"
    return None


def case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    n, d = shape["N"], shape["D"]
    x, y = (F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype) for _ in range(2))
    scale = torch.tensor(SCALE, device=device)
    providers = {"eager": eager, "compiled": compiled(eager), **ours(info_nce, device)}
    if device == "cpu":
        del providers["fastxm cpu"]  # which "fastxm" is
    providers |= forms(x, y) | peers(n, device)
    providers["fastxm siglip"] = lambda x, y, scale: siglip(x, y, scale, BIAS)
    return Case(
        inputs=tuple(t.requires_grad_() for t in (x, y, scale)),
        providers={name: too_much(name, n, device) or p for name, p in providers.items()},
        work=(2 * n * n * d, 8 * n * n * d),
        other={
            "info-nce-pytorch": ("the loss of rows that it normalises again", renormalised),
            "pytorch-metric-learning": ("NT-Xent of 2 N rows: four times the pairs", nt_xent),
            **dict.fromkeys(("fastxm siglip", "siglip-kernel"), ("the sigmoid loss", sigmoid)),
        },
        untimed={name: why for name in providers if (why := too_long(name, n, device))},
    )


def run(argv: list[str] | None = None) -> list[dict]:
    return main("info_nce", SHAPES, case, argv, small=SMALL, alone=ALONE)


if __name__ == "__main__":
    run()

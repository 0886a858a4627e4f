"""InfoNCE, symmetric, with a learned scale: python benchmarks/bench_info_nce.py --help"""

import math

import torch
from common import Case, Shape, compiled, main, ours, peer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastxm.ops import info_nce

SHAPES = {
    "cpu": [
        {"N": 1024, "D": 512, "dtype": "float32"},
        {"N": 4096, "D": 512, "dtype": "float32"},
        {"N": 4096, "D": 512, "dtype": "bfloat16"},
    ],
    "cuda": [
        {"N": 4096, "D": 512, "dtype": "bfloat16"},
        {"N": 8192, "D": 512, "dtype": "float32"},
        {"N": 32768, "D": 512, "dtype": "bfloat16"},
        {"N": 32768, "D": 1024, "dtype": "bfloat16"},
        {"N": 65536, "D": 768, "dtype": "bfloat16"},
    ],
    "quick": [{"N": 64, "D": 64, "dtype": "float32"}],
}
SCALE = 1 / 0.07
ROWS = 512  # of a block, in the chunked form
MOST_PAIRS = 512  # pytorch-metric-learning compares every positive with every negative: N^3


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """One product, both directions of it: the fastest plain form."""
    logits = (scale.to(x.dtype) * x @ y.T).float()
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As in open_clip.ClipLoss on one device: a product for each direction."""
    labels = torch.arange(len(x), device=x.device)
    of_images, of_texts = scale.to(x.dtype) * x @ y.T, scale.to(x.dtype) * y @ x.T
    return (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2


def chunked(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Blocks of rows under torch.utils.checkpoint: O(N D) memory in plain PyTorch."""

    def block(a: Tensor, b: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(a), device=a.device)
        logits = (scale.to(a.dtype) * a @ b.T).float()
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


def siglip(package):
    temperature = math.log(SCALE)

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        bias = torch.tensor(-10.0, device=x.device)
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
        "siglip-kernel": peer("siglip_kernel", siglip, cuda_on=device),
        "liger-kernel": peer("liger_kernel.transformers", liger, cuda_on=device),
    }


def case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    n, d = shape["N"], shape["D"]
    x, y = (F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype) for _ in range(2))
    scale = torch.tensor(SCALE, device=device)
    providers = {"eager": eager, "compiled": compiled(eager), **ours(info_nce, device)}
    return Case(
        inputs=tuple(t.requires_grad_() for t in (x, y, scale)),
        providers=providers | peers(n, device),
        work=(2 * n * n * d, 8 * n * n * d),
        # a sigmoid; more negatives; a gradient without its radial part, by a norm inside
        other={"siglip-kernel", "pytorch-metric-learning", "info-nce-pytorch"},
    )


def run(argv: list[str] | None = None) -> list[dict]:
    return main("info_nce", SHAPES, case, argv)


if __name__ == "__main__":
    run()

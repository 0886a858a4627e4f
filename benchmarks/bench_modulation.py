"""Batch norm, modulation and ReLU in one: python benchmarks/bench_modulation.py --help"""

import torch
from common import Case, Shape, compiled, main, ours
from torch import Tensor
from torch.nn import functional as F

from fastxm.ops import modulation

LAYERS = [(16, 1536), (32, 768), (64, 384), (128, 192), (256, 96)]  # of a 256 px generator: S, C
FORMAT = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = {
    "cpu": [
        {"B": 16, "S": 64, "C": 32, "layout": "nchw", "dtype": "float32"},
        {"B": 16, "S": 64, "C": 32, "layout": "nhwc", "dtype": "bfloat16"},
        {"B": 4, "S": 256, "C": 96, "layout": "nchw", "dtype": "float32"},
        {"B": 4, "S": 256, "C": 96, "layout": "nhwc", "dtype": "float32"},
    ],
    "cuda": [
        *({"B": 64, "S": s, "C": c, "layout": "nhwc", "dtype": "bfloat16"} for s, c in LAYERS),
        {"B": 64, "S": 256, "C": 96, "layout": "nchw", "dtype": "bfloat16"},
        {"B": 64, "S": 256, "C": 96, "layout": "nhwc", "dtype": "float32"},
    ],
    "quick": [{"B": 2, "S": 32, "C": 3, "layout": "nchw", "dtype": "float32"}],
}
CELLS = 16  # gamma and beta are made at 16 x 16


def eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The maps upsampled, then batch norm without its own affine part."""
    size = x.shape[2:]
    gamma, beta = F.interpolate(gamma, size), F.interpolate(beta, size)
    return F.relu(F.batch_norm(x, None, None, training=True) * (1 + gamma) + beta)


def case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    b, s, c = shape["B"], shape["S"], shape["C"]
    layout = FORMAT[shape["layout"]]

    def tensor(side: int, scale: float) -> Tensor:
        values = scale * torch.randn(b, c, side, side, device=device)
        return values.to(dtype, memory_format=layout).requires_grad_()

    x, gamma, beta = tensor(s, 1.0), tensor(min(s, CELLS), 0.2), tensor(min(s, CELLS), 0.2)
    providers = {"eager": eager, "compiled": compiled(eager), **ours(modulation, device)}
    # forward reads x for the statistics and again to apply them, and writes y; backward reads x
    # and dy twice and writes dx
    bytes_of = [t.numel() * t.element_size() for t in (x, gamma, beta)]
    maps = bytes_of[1] + bytes_of[2]
    return Case(
        inputs=(x, gamma, beta),
        providers=providers,
        work=(3 * bytes_of[0] + maps, 8 * bytes_of[0] + 3 * maps),
        bound="copy",
    )


def run(argv: list[str] | None = None) -> list[dict]:
    return main("modulation", SHAPES, case, argv)


if __name__ == "__main__":
    run()

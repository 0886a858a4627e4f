"""Squared MMD of five RBF kernels: python benchmarks/bench_mmd.py --help"""

import torch
from common import Case, Shape, compiled, main, ours, peer
from torch import Tensor
from torch.nn import functional as F

from fastxm.ops import mmd2
from fastxm.ops.mmd import RBF

SHAPES = {
    "cpu": [
        {"N": 1024, "D": 64, "dtype": "float32"},
        {"N": 2048, "D": 64, "dtype": "float32"},
        {"N": 2048, "D": 256, "dtype": "float32"},
        {"N": 2048, "D": 256, "dtype": "bfloat16"},
    ],
    "cuda": [
        {"N": 4096, "D": 512, "dtype": "bfloat16"},
        {"N": 16384, "D": 512, "dtype": "bfloat16"},
        {"N": 16384, "D": 512, "dtype": "tf32"},
    ],
    "quick": [{"N": 32, "D": 16, "dtype": "float32"}],
}
SIGMAS = (1, 2, 4, 8, 16)
# N^2 D beyond which a call takes many seconds on a CPU: these take no matrix product
LONG = {"geomloss online": 1 << 28, "pykeops": 1 << 28}


def ours_mmd2(x: Tensor, y: Tensor) -> Tensor:
    return mmd2(x, y, RBF(SIGMAS))


def eager(x: Tensor, y: Tensor) -> Tensor:
    """Three matrix products; one exponential and four squarings serve the five bandwidths."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = a.float().square().sum(1)[:, None] + b.float().square().sum(1)
        distance = (squares - 2 * (a @ b.T).float()).clamp(min=0)
        power = torch.exp(distance / (-2 * SIGMAS[-1] ** 2))
        total = power
        for _ in SIGMAS[1:]:
            # half the bandwidth is the fourth power
            power = power.square().square()
            total = total + power
        return total.mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def cdist(x: Tensor, y: Tensor) -> Tensor:
    """As usually written: torch.cdist, and an exponential for each bandwidth."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = torch.cdist(a.float(), b.float()).square()
        return sum(torch.exp(distance / (-2 * s**2)) for s in SIGMAS).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def geomloss(backend: str):
    def build(package):
        losses = [package.SamplesLoss("gaussian", blur=s, backend=backend) for s in SIGMAS]
        # geomloss has half of the squared MMD
        return lambda x, y: 2 * sum(loss(x.float(), y.float()) for loss in losses)

    return build


def keops(package):
    lazy = package.LazyTensor

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        rows, columns = lazy(a[:, None].contiguous()), lazy(b[None].contiguous())
        distance = ((rows - columns) ** 2).sum(-1)
        total = sum((distance * (-0.5 / s**2)).exp() for s in SIGMAS)
        return total.sum(1).sum() / (len(a) * len(b))

    def run(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.float(), y.float()
        return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)

    return run


def too_long(name: str, n: int, d: int, device: str) -> str | None:
    if device == "cpu" and n * n * d > LONG.get(name, n * n * d):
        return f"not timed beyond N^2 D = {LONG[name]:.1e}, to keep the run short"
    return None


def case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    n, d = shape["N"], shape["D"]
    x = F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype)
    y = F.normalize(torch.randn(n, d, device=device) + 0.1, dim=1).to(dtype)
    providers = {
        "eager": eager,
        "compiled": compiled(eager),
        **ours(ours_mmd2, device),
        "cdist": cdist,
        "geomloss tensorized": peer("geomloss", geomloss("tensorized")),
        "geomloss online": peer("geomloss", geomloss("online")),
        "pykeops": peer("pykeops.torch", keops),
    }
    inputs = (x.requires_grad_(), y.requires_grad_())
    untimed = {name: why for name in providers if (why := too_long(name, n, d, device))}
    return Case(inputs, providers, (4 * n * n * d, 12 * n * n * d), untimed=untimed)


def run(argv: list[str] | None = None) -> list[dict]:
    return main("mmd", SHAPES, case, argv)


if __name__ == "__main__":
    run()

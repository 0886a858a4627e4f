"""The tiles of InfoNCE's kernels: which there are, which fit a GPU, and how one is chosen."""

import torch
import triton
from torch import Tensor
from triton import knobs

from .gemm import compiled


def _config(n: int, m: int, d: int, halvings: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "HALVINGS": halvings}
    blocks["GROUPS"] = min(warps, n // 16)
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


CANDIDATES = [
    _config(128, 256, 64, 3, 8, 3),
    _config(256, 128, 64, 3, 8, 3),
    _config(128, 128, 64, 3, 4, 3),
    _config(128, 128, 64, 2, 8, 3),
    _config(128, 64, 64, 2, 4, 4),
    _config(128, 128, 32, 3, 8, 3),
    _config(64, 64, 32, 0, 4, 3),
]
CONFIGS = [_config(32, 32, 32, 1, 4, 1)] if knobs.runtime.interpret else CANDIDATES
SMALL = 1 << 20  # pairs
TALLEST = max(config.kwargs["BLOCK_N"] for config in CONFIGS)
PART = 256  # columns, or a multiple: no tile crosses the border of a part


def _fits(config: triton.Config, itemsize: int, arch: int, labels: bool) -> bool:
    # a tile's rows are 128 bytes long, and so are fetched whole; tensor cores of sm_80 take their
    # operands from registers, those of float32 in three parts: room for fewer sums a thread, as
    # beside labels; on sm_100 that is so too, and few warps spill
    tile = config.kwargs
    held = tile["BLOCK_N"] * tile["BLOCK_M"] // (32 * config.num_warps)
    room = 128 if arch == 90 else 128 // itemsize
    room = min(room, 8 * config.num_warps) if arch >= 100 else room
    room = min(room, 64) if labels else room
    return tile["BLOCK_D"] * itemsize == 128 and held <= room


def architecture(x: Tensor) -> int:
    if not x.is_cuda:  # interpreted
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def one_reference(arch: int) -> bool:
    """Whether a tile may have one reference for all its rows and columns. To look for it takes a
    maximum of all of a tile, which Triton 3.6 and 3.7 cannot compile for sm_100."""
    return arch < 100 or triton.__version__.split(".")[:2] not in (["3", "6"], ["3", "7"])


def _fitting(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    x = arguments["x"]
    labels = arguments.get("labels") is not None
    fitting = [c for c in configs if _fits(c, x.element_size(), architecture(x), labels)]
    # a small problem takes less time than trying: the smallest tile, of which there are the most
    return fitting[-1:] if arguments["N"] * arguments["M"] < SMALL else fitting


def tuned(kernel: triton.JITFunction, configs: list[triton.Config],
          *keys: str) -> triton.runtime.Autotuner:  # fmt: skip
    # what the tiles are chosen by, beside dtypes; choices are kept on disk
    offered = ("tuned_for", "LABELS", "COLUMNS", "PRECISION", *keys)
    return triton.autotune(
        configs, [key for key in offered if key in kernel.arg_names],
        prune_configs_by={"early_config_prune": _fitting}, cache_results=True,
    )(kernel)  # fmt: skip


def size_class(N: int, M: int, D: int) -> int:
    # problems of about one size share their tiles; none of SMALL is of a class with a larger one
    return 100 * (D - 1).bit_length() + (N * M).bit_length() // 3


def compiles(kernel: triton.JITFunction, candidates: list[triton.Config]) -> list:
    built = []
    types = {"smoothing": "fp32", "row_labels": "*i32:16", "labels": "*i32:16"}
    floats = ("a", "b", "row", "column", "positive", "bounds", "scale", "bias", "sums")
    types |= dict.fromkeys(floats, "*fp32:16")
    types |= dict.fromkeys(("M", "D", "part", "g_stride"), "i32:16")
    variants = (("*bf16:16", 2, "tf32x3"), ("*fp32:16", 4, "tf32x3"), ("*fp32:16", 4, "tf32"))
    for element, itemsize, precision in variants:
        types |= dict.fromkeys(("x", "y", "g"), element)
        for tile in candidates:
            rare = dict(zip(candidates[::3], ((False, False), (True, True)))).get(tile)
            for labels, columns in ((False, True), *([rare] if rare else [])):
                fitting = [a for a in (80, 90, 100) if _fits(tile, itemsize, a, labels)]
                constants = {"LABELS": labels, "COLUMNS": columns, "SCALED": labels,
                             "SMOOTHED": labels, "SUMS": 4 if labels else 2, "GRADIENTS": columns,
                             "PRECISION": precision, "GROUP": 8, **tile.kwargs}  # fmt: skip
                for shared in sorted({one_reference(a) for a in fitting}):
                    archs = [a for a in fitting if one_reference(a) == shared]
                    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages,
                               "archs": archs}  # fmt: skip
                    built.append(compiled(kernel, types, constants | {"SHARED": shared}, options))
    return built


COMPILES: list = []  # kernels stand in other modules

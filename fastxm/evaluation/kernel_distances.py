"""Kernel distances of sets of features: KID and CMMD, of features that may stay on disk."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxm.ops import mmd2
from fastxm.ops.mmd import RBF, Polynomial
from fastxm.ops.mmd_stream import streamed_mmd2

Features = Tensor | np.ndarray | str | Path


class KID(NamedTuple):
    """Mean and standard deviation over subsets; a mean below 0 is no error."""

    mean: float
    std: float


def kid(
    a: Features,
    b: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> KID:
    """Kernel inception distance: unbiased MMD^2 by (<x, y> / D + 1)^3, averaged over subsets.

    Subsets are drawn as torch-fidelity draws them, so that one seed gives its subsets. Only their
    rows are read.

    Args:
        a, b: [N, D] and [M, D] features, or .npy files of them, which are mapped.
        subsets: how many.
        subset_size: rows of each, drawn without replacement; N and M at most.
        seed: of the subsets.
        device: where they are compared, in float64.

    Raises:
        ValueError: shapes do not fit, or a set has fewer rows than a subset.

    Source: Binkowski et al. 2018 (ICLR), Demystifying MMD GANs.
    """
    sets = opened(a, b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"kid needs subsets of 2 rows or more, not {subsets} of {subset_size}")
    rows = [len(z) for z in sets]
    if min(rows) < subset_size:
        raise ValueError(f"a subset of {subset_size} rows needs as many, not {rows}")
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        some = [z[random.choice(len(z), subset_size, replace=False)] for z in sets]
        x, y = (torch.as_tensor(z).to(device, torch.float64) for z in some)
        found.append(mmd2(x, y, Polynomial(3), estimator="unbiased").item())
    return KID(float(np.mean(found)), float(np.std(found)))


def cmmd(
    a: Features,
    b: Features,
    *,
    bandwidth: float = 10.0,
    scale: float = 1000.0,
    block: int = 8192,
    device: torch.device | str = "cpu",
) -> float:
    """CMMD: `scale` times the biased MMD^2 by one RBF, of embeddings by CLIP of unit length.

    Args:
        a, b: [N, D] and [M, D] embeddings, or .npy files of them, read a block of rows at a time.
            They are taken as they are: give unit rows.
        bandwidth: in units of the embeddings.
        scale: of the result.
        block: rows that are read at a time.
        device: where they are compared, in float64: near 0 float32 is all rounding.

    Raises:
        ValueError: shapes do not fit, or a set is empty.

    Source: Jayasumana et al. 2024 (CVPR), Rethinking FID.
    """
    x, y = opened(a, b)
    kernel, wide = RBF(bandwidth), torch.float64
    return scale * streamed_mmd2(x, y, kernel, block=block, device=device, dtype=wide).item()


def opened(*sets: Features) -> list[Any]:
    """Features as tensors or arrays; files are mapped, not read."""
    found = [np.load(z, mmap_mode="r") if isinstance(z, str | Path) else z for z in sets]
    if any(len(z.shape) != 2 for z in found) or len({z.shape[1] for z in found}) > 1:
        raise ValueError(f"features are [N, D] and [M, D], not {[tuple(z.shape) for z in found]}")
    return found

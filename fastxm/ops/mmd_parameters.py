"""The numbers of a kernel: what a user may give, and the tensors of them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Values = float | Tensor | Sequence[float | Tensor]


def vector(values: Values, like: Tensor) -> Tensor:
    """A number, a sequence or a tensor as [K], of the dtype and device of `like`."""
    if isinstance(values, Tensor):
        return values.to(like).reshape(-1)
    # filled, not copied from the host, so that CUDA graphs capture it
    items = values if isinstance(values, Sequence) else [values]
    return torch.stack([v.to(like).reshape(()) if isinstance(v, Tensor) else like.new_full((), v)
                        for v in items])  # fmt: skip


def positive(name: str, values: Values) -> None:
    """Raises ValueError unless every value is above 0; a CUDA tensor is not read, it would wait."""
    items = list(values) if isinstance(values, Sequence) else [values]
    if not items:
        raise ValueError(f"{name} must hold one value or more")
    for v in items:
        if not isinstance(v, Tensor):
            good = v > 0
        else:
            unread = v.device.type != "cpu" or torch.compiler.is_compiling()
            good = unread or (v.numel() > 0 and bool((v > 0).all()))
        if not good:
            raise ValueError(f"{name} must be above 0, not {values}")


def halving(values: Values) -> bool:
    """Whether all are numbers, each half of the next larger one."""
    if not isinstance(values, Sequence) or any(isinstance(v, Tensor) for v in values):
        return False
    ordered = sorted(values)
    return all(2 * a == b for a, b in pairwise(ordered))


def mixed(shapes: Tensor, weights: Values) -> Tensor:
    """[2, K] of shapes [K] and K weights, or one weight for all."""
    w = vector(weights, shapes)
    if w.numel() not in (1, shapes.numel()):
        raise ValueError(f"{shapes.numel()} parts need as many weights or one, not {w.numel()}")
    return torch.stack([shapes, w.expand_as(shapes)])

"""The numbers of a kernel: what a user may give, and the tensors of them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Values = float | Tensor | Sequence[float | Tensor]


def vector(values: Values, like: Tensor) -> Tensor:
    """A number, a sequence or a tensor as [K], of the dtype and device of `like`."""
    if isinstance(values, Tensor):
        return values.to(like).reshape(-1)
    items = values if isinstance(values, Sequence) else [values]
    if like.device.type == "cpu" and not any(isinstance(v, Tensor) for v in items):
        return torch.tensor(items, dtype=like.dtype)
    # filled, not copied from the host, so that CUDA graphs capture it
    return torch.stack([v.to(like).reshape(()) if isinstance(v, Tensor) else like.new_full((), v)
                        for v in items])  # fmt: skip


def each(values: Values, like: Tensor, f: Callable[[Any], Any]) -> Values:
    """f of a number or a tensor, which is made one like `like`, or of each of a sequence."""
    if isinstance(values, Sequence):
        return [each(v, like, f) for v in values]  # type: ignore[misc]
    return f(values.to(like) if isinstance(values, Tensor) else values)


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


def single(name: str, value: float | Tensor) -> float | Tensor:
    """The value; raises ValueError where it is a tensor of more or fewer elements than one."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} is a number or one element, not {[*value.shape]}")
    return value


def halving(values: Values) -> bool:
    """Whether all are numbers, each half of the next larger one."""
    if not isinstance(values, Sequence) or any(isinstance(v, Tensor) for v in values):
        return False
    ordered = sorted(values)
    return all(2 * a == b for a, b in pairwise(ordered))


def mixed(shapes: Values, weights: Values, like: Tensor) -> Tensor:
    """[2, K] of K shapes and K weights, or one weight for all."""
    s, w = vector(shapes, like), vector(weights, like)
    if w.numel() not in (1, s.numel()):
        raise ValueError(f"{s.numel()} parts need as many weights or one, not {w.numel()}")
    return torch.stack([s, w.expand_as(s)])

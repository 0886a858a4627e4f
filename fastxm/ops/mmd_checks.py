"""What mmd2 takes: its checks, and all forms of its arguments made one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.mmd_kernels import Kernel

ESTIMATORS = ("biased", "unbiased", "u_statistic", "linear", "block")
PRECISIONS = ("float64", "float32", "bfloat16", "tf32", "tf32x3")


class Problem(NamedTuple):
    """Rows of all problems one below the other; starts [G + 1] on the CPU, None for one problem.

    x [N, D], y [M, D]; a [N] and b [M], weights of the rows, float32 or float64.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    x_starts: Tensor | None
    y_starts: Tensor | None


def problem(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    estimator: str = "biased",
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    x_starts: Tensor | None = None,
    y_starts: Tensor | None = None,
    least: int | None = None,
    one: bool = False,
) -> Problem:
    """The arguments of mmd2 as a Problem; raises ValueError or TypeError where they are none.

    least: rows of a sample, if not what the estimator needs (a rank may have none). one: of one
    problem alone, x [N, D] and y [M, D].
    """
    dispatch.one_device("mmd2", x, y, x_weight, y_weight)
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(f"mmd2 needs floating x and y, not {x.dtype} and {y.dtype}")
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel is one of fastxm.ops.mmd or a sum of them, not {kernel!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is one of {', '.join(ESTIMATORS)}, not {estimator!r}")
    many = x.ndim == 3 and not one and x.shape[0] > 0
    if not (x.ndim == 2 or many) or y.shape[:-2] != x.shape[:-2] or x.shape[-1] != y.shape[-1]:
        forms = "" if one else ", or [G, N, D] and [G, M, D] of one problem or more"
        raise ValueError(f"mmd2 needs x [N, D] and y [M, D]{forms}, not {[*x.shape]} and "
                         f"{[*y.shape]}")  # fmt: skip
    for weight, rows in ((x_weight, x), (y_weight, y)):
        if weight is not None and weight.shape != rows.shape[:-1]:
            raise ValueError(f"weights must be {[*rows.shape[:-1]]}, one a row, not "
                             f"{[*weight.shape]}")  # fmt: skip
    if estimator not in ("biased", "unbiased") and (x_weight is not None or y_weight is not None):
        raise ValueError(f"estimator {estimator!r} takes no weights")
    if (x_starts is None) != (y_starts is None):
        raise ValueError("mmd2 needs both x_starts and y_starts, or neither")
    counts = [(x.shape[-2], y.shape[-2])]
    if x_starts is not None and y_starts is not None:
        counts = _ragged(x, y, estimator, x_starts, y_starts)
    least = (1 if estimator == "biased" else 2) if least is None else least
    if any(min(pair) < least for pair in counts) or x.shape[-1] < 1:
        raise ValueError(f"estimator {estimator!r} needs {least} rows or more of one feature or "
                         f"more, not {[*x.shape]} and {[*y.shape]}"
                         + (f" of {counts} rows" if x_starts is not None else ""))  # fmt: skip
    wide = dispatch.wide_dtype(x, y)
    if estimator not in ("biased", "unbiased") and any(n != m for n, m in counts):
        raise ValueError(f"estimator {estimator!r} needs N = M, not {counts}")
    if x.ndim == 3:
        x_starts, y_starts = (torch.arange(z.shape[0] + 1) * z.shape[1] for z in (x, y))
    elif x_starts is not None and y_starts is not None:
        x_starts, y_starts = x_starts.cpu().long(), y_starts.cpu().long()
    a, b = (z.new_ones(z.shape[:-1], dtype=wide) if w is None else w.to(wide)
            for z, w in ((x, x_weight), (y, y_weight)))  # fmt: skip
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    return Problem(x, y, a.flatten(), b.flatten(), x_starts, y_starts)


def _ragged(x, y, estimator, x_starts: Tensor, y_starts: Tensor) -> list[tuple[int, int]]:
    """The rows of each problem."""
    if x.ndim != 2 or estimator in ("linear", "block"):
        raise ValueError("starts are for x [N, D] and y [M, D], and not for estimators 'linear' "
                         "and 'block'")  # fmt: skip
    both = []
    for rows, starts in ((x, x_starts), (y, y_starts)):
        if starts.ndim != 1 or starts.is_floating_point() or len(starts) < 2:
            raise ValueError(f"starts are integers [G + 1], not {starts.dtype} {[*starts.shape]}")
        ends = starts.tolist()
        if ends[0] != 0 or ends[-1] != len(rows) or ends != sorted(ends):
            raise ValueError(f"starts go from 0 up to {len(rows)}, not {ends}")
        both.append([j - i for i, j in pairwise(ends)])
    if len(both[0]) != len(both[1]):
        raise ValueError(f"x has {len(both[0])} problems, y has {len(both[1])}")
    return list(zip(*both))


def chosen(precision: str | None, x: Tensor, y: Tensor) -> str:
    """The precision of products that mmd2 uses for these inputs."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    if dispatch.wide_dtype(x, y) == torch.float64:
        if precision not in (None, "float64"):
            raise ValueError(f"float64 inputs are multiplied in float64, not in {precision}")
        return "float64"
    if precision == "float64":
        raise ValueError("precision float64 is for float64 inputs")
    if precision is not None:
        return precision
    if x.dtype == y.dtype == torch.bfloat16:
        return "bfloat16"
    return "tf32" if x.is_cuda and tf32_allowed() else "float32"


@torch.compiler.assume_constant_result  # Dynamo cannot trace the getter, but guards the setting
def tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def families(kernel: Kernel) -> list[list[Kernel]]:
    """The terms of a kernel, those together that are functions of one statistic of a pair."""
    found: dict[str, list[Kernel]] = {}
    for term in kernel.terms:
        found.setdefault("radial" if term.radial else term.kind, []).append(term)
    return list(found.values())


def stated(terms: Sequence[Kernel], like: Tensor) -> tuple[list[int], Tensor]:
    """Terms as native code takes them, three integers each, and the parameters of all [P].

    like: of x's width, of the parameters' dtype.
    """
    parameters = [term.parameters(like) for term in terms]
    numbers = [n for k, p in zip(terms, parameters) for n in k.term(p.shape[1])]
    return numbers, torch.cat([p.flatten() for p in parameters])

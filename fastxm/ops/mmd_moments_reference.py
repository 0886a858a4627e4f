"""The sums of mmd_moments in plain PyTorch, of any kernel on any device, and their gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastxm.ops.mmd_pairs import Term, by_parameters, distances, slope, value

BLOCK = 1 << 20  # pairs of rows at a time
MATRICES = ((0, 0), (1, 1), (0, 1))  # samples of the rows and of the columns


def formula(
    terms: list[Term], x: Tensor, y: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The moments in plain PyTorch, differentiable to any order; without gradients in blocks."""
    sums, squares = [], []
    for r, c in MATRICES:
        x_of, y_of, own = (x, y)[r], (x, y)[c], r == c
        found = []
        for start, rows in _blocks(x_of, y_of):
            k = _block(_each(terms, parameters, rows, y_of), start if own else None).double()
            found.append((k.sum(1), k.sum(0), k.square().sum()))
        of_rows, of_columns, of_squares = zip(*found)
        sums += [torch.cat(of_rows)] if own else [torch.cat(of_rows), sum(of_columns)]
        squares.append(sum(of_squares))
    a, b, p, q = sums
    return a, b, p, q, torch.stack(squares)


def gradients(
    terms: list[Term], x: Tensor, y: Tensor, parameters: Tensor, cotangents: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the formula, a block at a time."""
    da, db, dp, dq, ds = cotangents
    dz, by = [torch.zeros_like(x), torch.zeros_like(y)], ds.new_zeros(len(parameters))
    none = torch.zeros_like(da)
    for (r, c), u, v, square in zip(MATRICES, (da, db, dp), (none, none, dq), 2 * ds):
        columns = (x, y)[c]
        for start, rows in _blocks((x, y)[r], columns):
            some, middle = slice(start, start + len(rows)), columns.mean(0)
            each = _each(terms, parameters, rows, columns)
            k = _block(each, start if r == c else None)
            g = (u[some, None] + v + square * k).to(k)
            if r == c:
                g.diagonal(start).zero_()
            for term in each:
                w, radial = g * slope(*term), term[0][0].radial
                u_of, v_of = (rows - middle, columns - middle) if radial else (rows, columns)
                dz[r][some] += w @ v_of
                dz[c] += w.mT @ u_of
                if radial:
                    dz[r][some] -= w.sum(1)[:, None] * u_of
                    dz[c] -= w.sum(0)[:, None] * v_of
            found = [(g * d).sum().double() for term in each for d in by_parameters(*term)]
            by += torch.stack(found)
    return dz[0], dz[1], by.to(parameters)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    n = max(1, BLOCK // len(y))
    return zip(range(0, len(x), n), x.split(n))


def _each(terms: list[Term], parameters: Tensor, x: Tensor, y: Tensor) -> list[tuple]:
    """Each term as mmd_pairs takes it, alone: the statistic of each pair and its parameters."""
    kinds, middle = {term.radial for term in terms}, y.detach().mean(0)
    statistics = {radial: distances(x - middle, y - middle) if radial else x @ y.mT
                  for radial in kinds}  # fmt: skip
    own = parameters.split([2 * term.parts for term in terms])
    return [([term], statistics[term.radial], p) for term, p in zip(terms, own)]


def _block(each: list[tuple], start: int | None) -> Tensor:
    """Some rows of the kernel's matrix; start: of the rows, where the diagonal counts as 0."""
    k = torch.stack([value(*term) for term in each]).sum(0)
    if start is None:
        return k
    own = torch.zeros_like(k, dtype=torch.bool)
    own.diagonal(start).fill_(True)
    return k.masked_fill(own, 0)

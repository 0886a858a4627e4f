"""Rows of a table, drawn by weight: batches of what has no partner."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self


class Draws:
    """Endless numbers of rows, each drawn by its weight and put back; the state is a generator's.

    Args:
        weights: [N], at least 0, in proportion.
        batch_size: B.
        seed: of the generator.
    """

    def __init__(self, weights: np.ndarray, batch_size: int, *, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}")
        weights = np.asarray(weights, np.float64)
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError("rows to draw have weights of 0 or more, and one above 0")
        self.ends = torch.from_numpy(np.cumsum(weights))
        self.last = int(np.flatnonzero(weights)[-1])
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        """int64 [B]."""
        return self.take(self.batch_size)

    def take(self, count: int) -> Tensor:
        """int64 [count]."""
        point = torch.rand(count, dtype=torch.float64, generator=self.generator) * self.ends[-1]
        return torch.searchsorted(self.ends, point, right=True).clamp(max=self.last)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])

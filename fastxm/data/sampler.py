"""Which pictures and captions come next: `BatchSampler`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastxm.data.captioned import CaptionedImages

MANY = 1 << 14  # groups from which on a batch is drawn without a look at each


class BatchSampler:
    """Batches without end, drawn by weight, that hold a concept once.

    A batch draws its groups without replacement by their total weight, then a picture of each by
    the pictures' weights, then one of its captions. Two pictures of one group would each be a
    negative of what it shows; only where there are fewer groups than places does one come twice.

    Args:
        dataset: gives weights, groups and the number of captions.
        batch_size: B.
        seed: of the sampler's own generator.
    """

    def __init__(self, dataset: "CaptionedImages", batch_size: int, *, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}")
        weights = np.asarray(dataset.weights, np.float64)
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError("a data set to draw from has weights of 0 or more, and one above 0")
        drawn = np.flatnonzero(weights)
        groups = [dataset.groups[i] for i in drawn]
        names = sorted(dict.fromkeys(groups))
        number = {name: i for i, name in enumerate(names)}
        group = np.array([number[name] for name in groups])
        order = np.argsort(group, kind="stable")
        self.images = torch.from_numpy(drawn[order])  # of group 0, then of group 1, ...
        self.ends = torch.from_numpy(np.cumsum(weights[drawn][order]))
        last = torch.from_numpy(np.searchsorted(group[order], np.arange(len(names)), "right") - 1)
        self.group_ends = self.ends[last]
        self.group_weights = torch.diff(self.group_ends, prepend=self.ends.new_zeros(1))
        self.heaviest = float(self.group_weights.max())
        self.last = last
        self.captions = torch.tensor([len(captions) for captions in dataset.captions])
        self.batch_size, self.batches = batch_size, 0
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Returns image indices [B] and caption numbers [B], both int64."""
        groups = self.draw_groups()
        within, number = torch.rand(
            2, self.batch_size, dtype=torch.float64, generator=self.generator
        )
        point = self.group_ends[groups] - (1 - within) * self.group_weights[groups]
        place = torch.searchsorted(self.ends, point, right=True).minimum(self.last[groups])
        images = self.images[place]
        self.batches += 1
        return images, (number * self.captions[images]).long()

    def draw_groups(self) -> Tensor:
        drawn, left = [], self.batch_size
        while left > 0:
            count = min(left, len(self.group_weights))
            drawn.append(self.draw_distinct(count))
            left -= count
        return torch.cat(drawn)

    def draw_distinct(self, count: int) -> Tensor:
        """Groups, drawn without replacement by their weight. Returns int64 [count]."""
        weights, total = self.group_weights, float(self.group_ends[-1])
        if len(weights) <= MANY or 2 * count * self.heaviest > total:
            return torch.multinomial(weights, count, False, generator=self.generator)
        # multinomial draws a number for each group; here at least every second is a new one
        found: dict[int, None] = {}
        while len(found) < count:
            left = count - len(found)
            point = torch.rand(left, dtype=torch.float64, generator=self.generator) * total
            drawn = torch.searchsorted(self.group_ends, point, right=True).clamp(
                max=len(weights) - 1
            )
            found.update(dict.fromkeys(drawn.tolist()))
        return torch.tensor(list(found))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.batches = state["batches"]

"""Batches of pictures and text features on the training device."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fastxm.data import BatchSampler, CaptionedImages
from fastxm.data.transforms import random_flip

Batch = dict[str, Any]


class CaptionTable(Protocol):
    """What is known of every caption, such as `TextFeatures` and `Tokens`."""

    def row(self, image: Any, caption: Any, /) -> Any:
        """Rows of captions number `caption` of pictures number `image`."""

    def batch(self, rows: Any, /) -> dict[str, Tensor]:
        """Of these rows, tensors [B, ...]."""


class CaptionedBatches:
    """Endless batches of a data set; the sampler's position is the state.

    A batch holds image [B, 3, S, S] in [0, 1], index [B] and caption, a list of B texts; of
    `TextFeatures` words [B, T, E], sentence [B, E] and lengths [B], of `Tokens` tokens [B, T] and
    lengths [B].

    Args:
        dataset: pictures and captions.
        features: what is known of every caption.
        batch_size: B.
        seed: of the sampler.
        flip: mirrors half of the pictures.
        device: where the tensors go.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        features: CaptionTable,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.features = dataset, features
        self.flip, self.device = flip, torch.device(device)
        self.sampler = BatchSampler(dataset, batch_size, seed=seed)

    def __iter__(self) -> Iterator[Batch]:
        for indices, numbers in self.sampler:
            yield self.batch(indices, numbers)

    def batch(self, indices: Tensor, numbers: Tensor) -> Batch:
        """The pictures `indices` [B] with their captions `numbers` [B]."""
        image = self.dataset.batch(indices)
        if self.flip:
            image = random_flip(image)
        text = self.features.batch(self.features.row(indices, numbers))
        tensors = {"image": image, **text, "index": indices}
        batch: Batch = {name: self.place(tensor) for name, tensor in tensors.items()}
        pairs = zip(indices.tolist(), numbers.tolist())
        return {**batch, "caption": [self.dataset.captions[i][k] for i, k in pairs]}

    def place(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Consecutive parts of a batch, of equal size."""
    size = len(batch["caption"]) // parts
    return [
        {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        for i in range(parts)
    ]

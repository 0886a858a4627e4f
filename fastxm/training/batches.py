"""Batches of pictures and text features on the training device."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fastxm.data import BatchSampler, CaptionedImages
from fastxm.data.transforms import random_flip
from fastxm.training.ranks import Ranks

Batch = dict[str, Any]


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; on its way to a GPU nothing waits for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pictures(dataset: CaptionedImages, indices: Tensor, device: torch.device) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] on the device: a GPU is sent bytes."""
    if device.type != "cuda":
        return dataset.batch(indices).to(device)
    return unpacked(place(dataset.pixels(indices), device))


def unpacked(pixels: Tensor) -> Tensor:
    """Bytes [B, S, S, 3] as channels_last floats [B, 3, S, S] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


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
        ranks: of several, each is given its own rows; `batch_size` is of them all.
        parts: of a batch that are shared out each by itself.
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
        ranks: Ranks | None = None,
        parts: int = 1,
    ):
        self.dataset, self.features = dataset, features
        self.ranks, self.parts = ranks or Ranks(), parts
        self.flip, self.device = flip, torch.device(device)
        self.sampler = BatchSampler(dataset, batch_size, seed=seed)

    def __iter__(self) -> Iterator[Batch]:
        for indices, numbers in self.sampler:
            yield self.batch(indices, numbers)

    def batch(self, indices: Tensor, numbers: Tensor) -> Batch:
        """Of the pictures `indices` [B] with their captions `numbers` [B], this rank's rows."""
        drawn = torch.rand(len(indices), device=self.device) if self.flip else None
        indices, numbers = (self.ranks.own(t, self.parts) for t in (indices, numbers))
        image = pictures(self.dataset, indices, self.device)
        if drawn is not None:
            image = random_flip(image, drawn=self.ranks.own(drawn, self.parts))
        text = self.features.batch(self.features.row(indices, numbers))
        tensors = {"image": image, **text, "index": indices}
        batch: Batch = {name: place(tensor, self.device) for name, tensor in tensors.items()}
        pairs = zip(indices.tolist(), numbers.tolist())
        return {**batch, "caption": [self.dataset.captions[i][k] for i, k in pairs]}

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

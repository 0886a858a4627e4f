"""Batches of pictures and text features on the training device."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fastxm.data import BatchSampler, CaptionedImages
from fastxm.data.captioned import planes
from fastxm.data.transforms import random_flip
from fastxm.training.ranks import Ranks

Batch = dict[str, Any]
AHEAD = 4  # batches that are read while a GPU is at work, each in a thread


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; on its way to a GPU nothing waits for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pictures(dataset: CaptionedImages, indices: Tensor, device: torch.device) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] on the device."""
    return on_device(dataset.pixels(indices), device)


def on_device(pixels: Tensor, device: torch.device) -> Tensor:
    """Bytes [B, S, S, 3] as pictures [B, 3, S, S] in [0, 1] on the device: a GPU is sent bytes."""
    if device.type != "cuda":
        return planes(pixels).to(device)
    return unpacked(place(pixels, device))


def unpacked(pixels: Tensor) -> Tensor:
    """Bytes [B, S, S, 3] as channels_last floats [B, 3, S, S] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


class CaptionTable(Protocol):
    """What is known of every caption, such as `TextFeatures` and `Tokens`."""

    def row(self, image: Any, caption: Any, /) -> Any:
        """Rows of captions number `caption` of pictures number `image`."""

    def batch(self, rows: Any, /) -> dict[str, Tensor]:
        """Of these rows, tensors [B, ...]."""


class ReadAhead(ABC):
    """Endless batches of a sampler; what they hold is read while those before are learnt from.

    The state is the position after the last batch that was handed out: a run that resumes draws
    again what had only been read.

    Args:
        sampler: says what comes next.
        device: where the batches go.
        ahead: batches that are read at a time; by default as many as `AHEAD` for a GPU, none for a
            CPU, whose cores are at work.
    """

    def __init__(self, sampler: BatchSampler, device: torch.device, ahead: int | None):
        self.sampler, self.device = sampler, device
        self.ahead = (AHEAD if device.type == "cuda" else 0) if ahead is None else ahead
        self.position = sampler.state_dict()

    @abstractmethod
    def read(self, indices: Tensor, numbers: Tensor) -> Batch:
        """What is known of pictures [B] and their captions [B]; called in a thread."""

    @abstractmethod
    def finish(self, read: Batch) -> Batch:
        """The batch on the device; called in turn, so that it may draw random numbers."""

    def batch(self, indices: Tensor, numbers: Tensor) -> Batch:
        """The pictures `indices` [B] with their captions `numbers` [B]."""
        return self.finish(self.read(indices, numbers))

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.load_state_dict(self.position)
        if self.ahead:
            yield from self.read_ahead()
        for drawn in self.sampler:
            self.position = self.sampler.state_dict()
            yield self.batch(*drawn)

    def read_ahead(self) -> Iterator[Batch]:
        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(self.ahead) as readers:
            for drawn in self.sampler:
                waiting.append((readers.submit(self.read, *drawn), self.sampler.state_dict()))
                if len(waiting) > self.ahead:
                    reading, self.position = waiting.popleft()
                    yield self.finish(reading.result())

    def state_dict(self) -> dict[str, Any]:
        return self.position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self.position = self.sampler.state_dict()


class CaptionedBatches(ReadAhead):
    """Endless batches of a data set.

    A batch holds image [B, 3, S, S] in [0, 1], index [B] and caption, a list of B texts; of
    `TextFeatures` words [B, T, E], sentence [B, E] and lengths [B], of `Tokens` tokens [B, T] and
    lengths [B].

    Args:
        dataset: pictures and captions.
        features: what is known of every caption.
        batch_size: B.
        seed: of the sampler.
        flip: mirrors half of the pictures.
        device, ahead: as `ReadAhead` takes them.
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
        ahead: int | None = None,
        ranks: Ranks | None = None,
        parts: int = 1,
    ):
        self.dataset, self.features, self.flip = dataset, features, flip
        self.ranks, self.parts = ranks or Ranks(), parts
        super().__init__(BatchSampler(dataset, batch_size, seed=seed), torch.device(device), ahead)

    def read(self, indices: Tensor, numbers: Tensor) -> Batch:
        whole = len(indices)
        indices, numbers = (self.ranks.own(t, self.parts) for t in (indices, numbers))
        text = self.features.batch(self.features.row(indices, numbers))
        pairs = zip(indices.tolist(), numbers.tolist())
        captions = [self.dataset.captions[i][k] for i, k in pairs]
        return {
            "whole": whole,
            "image": self.dataset.pixels(indices),
            **text,
            "index": indices,
            "caption": captions,
        }

    def finish(self, read: Batch) -> Batch:
        image = on_device(read.pop("image"), self.device)
        whole = read.pop("whole")  # rows of all ranks
        if self.flip:
            drawn = torch.rand(whole, device=self.device)
            image = random_flip(image, drawn=self.ranks.own(drawn, self.parts))
        captions = read.pop("caption")
        tensors = {name: place(tensor, self.device) for name, tensor in read.items()}
        return {"image": image, **tensors, "caption": captions}


def split(batch: Batch, parts: int) -> list[Batch]:
    """Consecutive parts of a batch, of equal size."""
    size = len(batch["caption"]) // parts
    return [
        {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        for i in range(parts)
    ]

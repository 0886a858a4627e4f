"""Batches of pictures and of their embeddings in a joint space, captions where they are known."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.data import BatchSampler, CaptionedImages, text_features
from fastxm.data.image_features import image_features
from fastxm.data.transforms import random_flip
from fastxm.training.batches import Batch, ReadAhead, on_device, place
from fastxm.training.ranks import Ranks


class Embeddings:
    """What a frozen joint encoder makes of a data set, computed once.

    Args:
        dataset: pictures, some or all of which may have no captions.
        encoder: as `fastxm.encoders.joint_encoder` gives it.
        label_fraction: share of the pictures whose captions may be learnt from, in [0, 1].
        texts: embed the captions; by default only where some may be learnt from.
        corpus: gives where texts of pictures' embeddings [N, D] are looked for, [N, D]; by default
            there themselves.
        progress: show progress bars.

    Attributes:
        image: [N, D], of the pictures, unit rows. evidence: [N, E], what the encoder saw.
        centre: [N, D], where the pictures' texts are looked for, unit rows.
        text: [sum of captions, D], unit rows; starts: [N + 1], where each picture's begin.
        labelled: [N], the pictures whose captions may be learnt from: one at least of a fraction
            above 0, and more of a larger one.

    Raises:
        ValueError: label_fraction is above 0 and no picture has a caption.
    """

    @torch.no_grad()
    def __init__(
        self,
        dataset: CaptionedImages,
        encoder: Any,
        *,
        label_fraction: float = 0.0,
        texts: bool | None = None,
        corpus: Callable[[Tensor], Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        features = image_features(dataset, encoder.image_encoder, progress=progress)
        rows = features.split(1024)
        self.image = torch.cat([encoder.embed_images(part).cpu() for part in rows])
        self.evidence = torch.cat([encoder.evidence(part).cpu() for part in rows])
        self.centre = self.image
        if corpus:  # a row for each text is wide
            self.centre = torch.cat([corpus(part) for part in self.image.split(1024)])
        counts = np.array([len(captions) for captions in dataset.captions])
        if label_fraction > 0 and not counts.any():
            raise ValueError(
                f"label_fraction is {label_fraction}, but {dataset.name} has no captions"
            )
        if not (label_fraction > 0 if texts is None else texts):
            counts[:] = 0
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        self.text = self.image.new_zeros(0, self.image.shape[1])
        if counts.any():
            self.text = embed_captions(dataset, encoder, progress=progress)
        shares = np.where(counts > 0, [share(id) for id in dataset.ids], np.inf)
        least = shares.min() if label_fraction > 0 else -1.0  # one picture at least
        self.labelled = torch.from_numpy((shares < label_fraction) | (shares <= least))

    def batch(self, indices: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Of pictures [B] and their captions `numbers` [B]; text is zero where there is none."""
        has = self.starts[indices + 1] > self.starts[indices]
        text = self.image.new_zeros(len(indices), self.image.shape[1])
        text[has] = self.text[(self.starts[indices] + numbers)[has]]
        return {
            "embedding": self.image[indices],
            "centre": self.centre[indices],
            "evidence": self.evidence[indices],
            "text": text,
            "labelled": self.labelled[indices],
        }

    def pairs(self, count: int) -> dict[str, Tensor]:
        """`count` labelled pictures drawn at random, each with one of its captions, as `batch`, and
        index [count], which pictures they are.
        """
        known = self.labelled.nonzero().squeeze(1)
        index = known[torch.randint(len(known), (count,))]
        counts = self.starts[index + 1] - self.starts[index]
        numbers = (torch.rand(count, dtype=torch.float64) * counts).long()
        return {"index": index, **self.batch(index, numbers)}


def embed_captions(dataset: CaptionedImages, encoder: Any, *, progress: bool = True) -> Tensor:
    """[sum of captions, D] of a data set's captions in turn, unit rows; features are cached."""
    encoded = text_features(dataset, encoder.text_encoder, progress=progress)
    sentences = torch.from_numpy(encoded.sentences[encoded.rows].astype(np.float32))
    return torch.cat([encoder.embed_text(part).cpu() for part in sentences.split(4096)])


def share(id: str) -> float:
    """A number in [0, 1) of a picture's name, the same on any machine."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big") / 2**32


class EmbeddedBatches(ReadAhead):
    """Endless batches of a data set.

    A batch holds image [B, 3, S, S] in [-1, 1], index [B], and what `Embeddings.batch` gives.

    Args:
        dataset: pictures.
        embeddings: of the data set.
        batch_size: B.
        seed: of the sampler.
        flip: mirrors half of the pictures; their embeddings stay.
        device, ahead: as `ReadAhead` takes them.
        ranks, parts: as `CaptionedBatches` takes them.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        embeddings: Embeddings,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        ahead: int | None = None,
        ranks: Ranks | None = None,
        parts: int = 1,
    ) -> None:
        self.dataset, self.embeddings, self.flip = dataset, embeddings, flip
        self.ranks, self.parts = ranks or Ranks(), parts
        super().__init__(BatchSampler(dataset, batch_size, seed=seed), torch.device(device), ahead)

    def read(self, indices: Tensor, numbers: Tensor) -> Batch:
        whole = len(indices)
        indices, numbers = (self.ranks.own(t, self.parts) for t in (indices, numbers))
        known = self.embeddings.batch(indices, numbers)
        image = self.dataset.pixels(indices)
        return {"whole": whole, "image": image, "index": indices, **known}

    def finish(self, read: Batch) -> Batch:
        image = on_device(read.pop("image"), self.device) * 2 - 1
        whole = read.pop("whole")  # rows of all ranks
        if self.flip:
            drawn = torch.rand(whole, device=self.device)
            image = random_flip(image, drawn=self.ranks.own(drawn, self.parts))
        rest = {name: place(t, self.device) for name, t in read.items()}
        return {"image": image, **rest}

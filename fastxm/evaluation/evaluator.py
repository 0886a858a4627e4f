"""How good a generator's pictures are: distance to real ones, and whether captions find them.

The distance is "EffLite0-FD": the Frechet distance over pooled features of EfficientNet-Lite0,
from pictures resized to 224 px. It is no FID, and the two are not to be compared. Fewer
pictures give a larger one, so each stands with their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages, open_dataset
from fastxm.data.cache import track
from fastxm.data.image_features import image_features
from fastxm.data.subsets import full_weight, principal
from fastxm.encoders import EfficientNetLite0
from fastxm.encoders.dual import DualEncoder
from fastxm.evaluation.metrics import FeatureStatistics, frechet, retrieval_recall

KS = (1, 5, 10)
POOLS = 20  # of captions, over which recall is averaged


class TextToImage(Protocol):
    """What is judged; it can be built anew, untrained, from its config, and lend its encoder."""

    config: Any

    def __init__(self, config: Any) -> None: ...

    @property
    def image_size(self) -> int: ...

    @property
    def text_encoder(self) -> Any: ...

    def attach(self, encoder: Any) -> None: ...

    def to(self, device: torch.device, /) -> Any: ...

    def generate(self, captions: Sequence[str], *, seed: int | None = None) -> Tensor: ...


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below count, in an order that the seed fixes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def ordinary(
    dataset: CaptionedImages, encoder: EfficientNetLite0, progress: bool
) -> tuple[CaptionedImages, Tensor]:
    """The pictures of full weight (of `emoji`, no skin tones and no flags), and their features."""
    # features of those that the dual encoder trains on, so that one cache serves both
    chosen = dataset.select(principal(dataset))
    features = image_features(chosen, encoder, progress=progress)
    rows = full_weight(chosen)
    return chosen.select(rows), features[rows]


class FrechetJudge:
    """EffLite0-FD of pictures against real ones of a data set, of full weight.

    Args:
        dataset: its pictures of full weight are shuffled; the first `num_images` are the real ones.
        encoder: of pictures.
        num_images: at most half of the pictures, so that the others can stand against them.
        seed: of the shuffle.
        progress: show a progress bar while encoding.

    Attributes:
        dataset: the pictures of full weight.
        rows: of it, the real pictures; `other_rows`: as many others.
        real: statistics of the features of `rows`.
        others: features [N, 1280] of `other_rows`.

    Raises:
        ValueError: the data set has fewer than 4 pictures of full weight.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        encoder: EfficientNetLite0,
        *,
        num_images: int = 1500,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.encoder = encoder
        self.dataset, features = ordinary(dataset, encoder, progress)
        order = shuffled(len(features), seed)
        count = min(num_images, len(features) // 2)
        if num_images < 2:
            raise ValueError(f"num_images must be 2 or more, not {num_images}")
        if count < 2:
            raise ValueError(f"a distance needs at least 4 pictures, not {len(features)}")
        self.rows, self.other_rows = order[:count], order[count : 2 * count]
        self.real = FeatureStatistics.of(features[self.rows])
        self.others = features[self.other_rows]

    def of(self, features: Tensor, sources: int | None = None) -> dict[str, float]:
        """The distance of pictures with the features [N, 1280].

        Args:
            features: of the pictures.
            sources: of how many pictures of the data set the pictures or their captions are, if
                fewer than N.

        Returns:
            "EffLite0-FD"; "pictures", N; "sources".
        """
        distance = frechet(FeatureStatistics.of(features), self.real)
        count = len(features)
        return {"EffLite0-FD": distance, "pictures": count, "sources": sources or count}


@dataclass(frozen=True)
class Captions:
    """Captions to draw, each of a picture of a data set.

    texts: N captions. rows: [N], the pictures. groups, kinds: [N], their concepts, and what they
    are of: the folder in a picture's id, in `emoji` the style.
    """

    texts: list[str]
    rows: np.ndarray
    groups: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, dataset: CaptionedImages, rows: np.ndarray, seed: int) -> "Captions":
        """A random caption of each of these pictures."""
        random = np.random.default_rng(seed)
        texts = [random.choice(dataset.captions[i]).item() for i in rows]
        kinds = [dataset.ids[i].rpartition("/")[0] for i in rows]
        return cls(texts, rows, np.array([dataset.groups[i] for i in rows]), np.array(kinds))


@dataclass(frozen=True)
class Evaluation:
    """A generator under one protocol; `evaluate` says what the fields are."""

    model: TextToImage
    dual: DualEncoder
    judge: FrechetJudge
    pool: int
    seed: int
    progress: bool

    def on_training(self) -> dict[str, dict[str, float]]:
        """Distances of what stands against training pictures and their captions."""
        judge = self.judge
        captions = Captions.of(judge.dataset, judge.other_rows.numpy(), self.seed).texts
        flat = mean_colours(judge.dataset.select(judge.rows))
        blank = replace(self, model=self.untrained())
        return {
            "training captions": judge.of(self.draw(captions, "training captions")),
            "untrained generator": judge.of(blank.draw(captions, "untrained")),
            "mean colours": judge.of(image_features(flat, judge.encoder, progress=self.progress)),
            "real against real": judge.of(judge.others),
        }

    def captions_of(self, dataset: CaptionedImages) -> Captions:
        """As many captions of these pictures as there are real ones in a distance: of fewer
        pictures each comes several times, with a choice among its captions anew each time."""
        random, count = np.random.default_rng(self.seed), len(self.judge.rows)
        turns = [random.permutation(len(dataset)) for _ in range(-(-count // len(dataset)))]
        return Captions.of(dataset, np.concatenate(turns)[:count], self.seed)

    def on_held_out(
        self, dataset: CaptionedImages
    ) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
        """Distances and retrieval of held-out captions and pictures, each drawn from noise anew."""
        judge = self.judge
        chosen, real = ordinary(dataset, judge.encoder, self.progress)
        captions = self.captions_of(chosen)
        drawn, order = self.draw(captions.texts, "held-out captions"), captions.rows
        once = order[: len(chosen)]
        distance = {"held-out captions": judge.of(drawn, len(once))}
        if len(once) > 1:
            distance["held-out pictures"] = judge.of(real[once])
            distance["real against real, as few"] = judge.of(judge.others[: len(once)])
        return distance, self.retrieval(captions, drawn, real[order])

    @torch.no_grad()
    def retrieval(self, captions: Captions, drawn: Tensor, real: Tensor) -> dict[str, Any]:
        """Recall of captions by features [N, 1280] of what was drawn of them, and of real ones."""
        pools = caption_pools(captions, self.pool, self.seed)
        keys = embed_captions(self.dual, captions.texts)
        of = len(pools[0])
        found = {
            "generated": pooled_recall(self.dual.embed_images(drawn), keys, pools),
            "real": pooled_recall(self.dual.embed_images(real), keys, pools),
            "chance": {f"R@{k}": min(k / of, 1.0) for k in KS},
        }
        return {name: {**recall, "of": of} for name, recall in found.items()}

    def draw(self, captions: Sequence[str], title: str, chunk: int = 64) -> Tensor:
        """Features [N, 1280] of a picture of each caption, each from noise of its own."""
        parts = []
        starts = range(0, len(captions), chunk)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for start in track(starts, len(captions), title, step=chunk, progress=self.progress):
                # with a seed, generate gives every caption the same noise
                images = self.model.generate(captions[start : start + chunk], seed=None)
                parts.append(self.judge.encoder.embed(images).cpu())
        return torch.cat(parts)

    def untrained(self) -> TextToImage:
        """A model of the same config that never trained: its weights are drawn from this seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            blank = type(self.model)(self.model.config).to(self.dual.device)
        blank.attach(self.model.text_encoder)
        return blank


def evaluate(
    model: TextToImage,
    dual: DualEncoder,
    data: str = "emoji",
    *,
    num_images: int = 1500,
    pool: int = 100,
    seed: int = 0,
    progress: bool = True,
    options: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Draws pictures of training and of held-out captions and judges them, beside baselines.

    Args:
        model: the generator; `model.image_size` is the side of its pictures.
        dual: ranks captions by pictures; its image encoder gives the features of the distance.
        data: "emoji", or a folder or tar shards of captioned pictures.
        num_images: drawn for each distance, if the data set has twice as many.
        pool: captions among which a picture is to find its own, of as many concepts.
        seed: of what is chosen and of the noise, which differs from picture to picture.
        progress: show progress bars.
        options: of `open_dataset`, such as the styles of `emoji`.

    Returns:
        "distance": by what was judged, "EffLite0-FD" against training pictures, "pictures", how
        many were judged, and "sources", of how many pictures of the data set they are;
        "retrieval": by what was judged, R@1, R@5, R@10, and "of", how many captions;
        empty where the data set holds nothing out.
    """
    size = model.image_size
    train, held_out = (
        open_dataset(data, size, split, progress=progress, **(options or {}))
        for split in ("train", "val")
    )
    judge = FrechetJudge(
        train, dual.image_encoder, num_images=num_images, seed=seed, progress=progress
    )
    evaluation = Evaluation(model, dual, judge, pool, seed, progress)
    distance = evaluation.on_training()
    if len(held_out) == 0:
        return {"distance": distance, "retrieval": {}}
    more, retrieval = evaluation.on_held_out(held_out)
    return {"distance": {**distance, **more}, "retrieval": retrieval}


def mean_colours(dataset: CaptionedImages) -> CaptionedImages:
    """The data set with every picture in one colour, its mean."""
    means = np.stack([picture.mean((0, 1)) for picture in dataset.images])
    images = np.broadcast_to(means.round().astype(np.uint8)[:, None, None], dataset.images.shape)
    return replace(dataset, images=images, ids=[f"mean of {id}" for id in dataset.ids])


def caption_pools(captions: Captions, size: int, seed: int) -> list[np.ndarray]:
    """Pools of as many captions as `size`, each of a concept of its own, all of one kind.

    Of one kind, lest a style that captions name and pictures show tell right from wrong. Where no
    kind has enough concepts, kinds are mixed; where all have too few, pools are smaller.
    """
    random = np.random.default_rng(seed)
    enough = [
        kind
        for kind in np.unique(captions.kinds)
        if len(np.unique(captions.groups[captions.kinds == kind])) >= size
    ]
    pools = []
    for turn in range(POOLS):
        allowed = np.arange(len(captions.texts))
        if enough:
            allowed = np.flatnonzero(captions.kinds == enough[turn % len(enough)])
        allowed = random.permutation(allowed)
        _, first = np.unique(captions.groups[allowed], return_index=True)
        pools.append(allowed[random.permutation(first)[:size]])
    return pools


@torch.no_grad()
def embed_captions(dual: Any, texts: list[str], chunk: int = 64) -> Tensor:
    """[N, D], of captions that may repeat, by `embed_text`."""
    distinct, place = np.unique(texts, return_inverse=True)
    starts = range(0, len(distinct), chunk)
    embedded = [dual.embed_text(distinct[start : start + chunk].tolist()) for start in starts]
    return torch.cat(embedded)[torch.from_numpy(place)]


def pooled_recall(query: Tensor, keys: Tensor, pools: list[np.ndarray]) -> dict[str, float]:
    """R@k of finding a picture's caption among those of its pool, the mean over the pools.

    Args:
        query: [N, D], the pictures.
        keys: [N, D], their captions.
        pools: numbers of pictures.
    """
    found = [
        retrieval_recall(query[pool], keys[pool], torch.arange(len(pool)), KS)
        for pool in map(torch.from_numpy, pools)
    ]
    return {f"R@{k}": float(np.mean([r[k] for r in found])) for k in KS}

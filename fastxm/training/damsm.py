"""DAMSM's training: captions and pictures of a batch find each other, word by word and as wholes.

    loss = word + sentence        (`fastxm.losses.damsm_loss`)

Pictures of one concept are no negatives of each other.
(Xu et al. AttnGAN, CVPR 2018, section 3.2; constants of the released code.)
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastxm import losses
from fastxm.data.image_features import image_features
from fastxm.encoders.damsm import DAMSM, DAMSMConfig
from fastxm.evaluation.metrics import retrieval_recall
from fastxm.training.batches import Batch
from fastxm.training.captions import (
    CaptionRecipe,
    CaptionTraining,
    chosen,
    concepts,
    with_words,
)


@dataclass(frozen=True, kw_only=True)
class DAMSMTraining(CaptionTraining):
    """Everything that decides a training of DAMSM."""

    model: DAMSMConfig = field(default_factory=DAMSMConfig)
    beta1: float = 0.5
    """Adam's decay of the mean."""
    lr_decay: float = 0.98
    """Its factor after each pass over as many pictures as there are."""
    lr_min: float = 2e-4
    """Where that ends."""
    clip_norm: float = 0.25
    """Bound of the norm of the text half's gradient."""


class RegionEye:
    """Regions and whole of a picture as one row, for the cache.

    Args:
        model: looks at pictures.

    Raises:
        ValueError: its image encoder has other widths than its configuration.
    """

    def __init__(self, model: DAMSM):
        self.model = model
        self.name = f"{model.image_encoder.name}-regions"
        with torch.no_grad():
            regions, whole = model.look(torch.zeros(1, 3, 8, 8, device=model.device))
        found = (regions.shape[2], whole.shape[1])
        if found != (model.config.region_width, model.config.image_width):
            raise ValueError(
                f"{model.config.image_encoder} has region_width {found[0]} and image_width "
                f"{found[1]}, the configuration {model.config.region_width} and "
                f"{model.config.image_width}"
            )
        self.width = regions[0].numel() + whole.shape[1]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        device = self.model.device
        chunks = images.split(16 if device.type == "cpu" else 256)  # as EfficientNetLite0.embed
        looks = [self.model.look(chunk.to(device)) for chunk in chunks]
        return torch.cat([torch.cat([r.flatten(1), w], 1) for r, w in looks])


class DAMSMRecipe(CaptionRecipe):
    """DAMSM as the loop sees it."""

    system = "damsm"
    spans = True
    model: DAMSM
    config: DAMSMTraining

    def make(self, vocabulary: tuple[str, ...]) -> DAMSM:
        config = self.config.model
        return DAMSM(replace(config, stem=with_words(config.stem, vocabulary)))

    def eye(self) -> RegionEye:
        return RegionEye(self.model)

    def losses(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        regions, image = self.model.project(*self.parts(features))
        tokens = batch["hidden"] if "hidden" in batch else batch["tokens"]
        text = self.model.stem.read(tokens, batch["lengths"])
        given = (regions, text.words, text.lengths, image, text.sentence)
        labels, group = self.labels[batch["index"]], self.ranks.group
        word, sentence = losses.damsm_loss(*given, labels=labels, group=group)
        return {"loss": word + sentence, "word": word, "sentence": sentence}

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Regions [B, R, region_width] and whole [B, image_width] of a row of `RegionEye`."""
        model = self.config.model
        regions, whole = features[:, : -model.image_width], features[:, -model.image_width :]
        return regions.unflatten(1, (-1, model.region_width)), whole

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.stem.parameters(), self.config.clip_norm)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Recall of a held-out picture's concept, by the first caption of each."""
        if len(self.held) == 0:
            return {}
        held = chosen(self.held)
        labels = concepts(held)
        first = {label: held.captions[i][0] for i, label in reversed([*enumerate(labels.tolist())])}
        names = sorted(first)
        self.model.eval()
        whole = self.parts(image_features(held, self.sight))[1].to(self.device)
        query = self.model.image(whole)
        keys = self.model.embed_text([first[label] for label in names])
        self.model.train()
        truth = labels[:, None] == torch.tensor(names)
        found = retrieval_recall(query, keys, truth, (1, 5, 10))
        return {f"R@{k}": value for k, value in found.items()}

"""How near sampled text embeddings are to true ones, on held-out pictures and their captions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages
from fastxm.evaluation.metrics import retrieval_recall
from fastxm.nn.directions import draw_noise
from fastxm.training.embeddings import Embeddings

PICTURES = 256


class HeldOutPairs:
    """Held-out pictures, each with its first caption, and noise that stays the same.

    Args:
        dataset: at most 256 pictures are taken, of as many concepts, the heaviest of each.
        embed: gives `Embeddings` of them.
        seed: of the noise.
        noise: its form.
    """

    def __init__(
        self, dataset: CaptionedImages, embed: Callable[..., Embeddings], seed: int, noise: str
    ) -> None:
        heavy = sorted(range(len(dataset)), key=lambda i: -dataset.weights[i])
        first = {dataset.groups[i]: i for i in reversed(heavy) if dataset.captions[i]}
        chosen = dataset.select(sorted(first.values())[:PICTURES])
        embedded = embed(chosen, texts=True)
        self.image, self.evidence = embedded.image, embedded.evidence
        self.centre = embedded.centre
        self.text = embedded.text[embedded.starts[:-1]]
        source = torch.Generator().manual_seed(seed)
        self.noise = draw_noise(*self.image.shape, form=noise, generator=source)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Of a LAFITE or VDL: cosines with the true text and recall among all of them.

        cos_image: of the picture's embedding; cos_prior: of a sample of p; of a model with a
        posterior also cos_sampled, of a sample of q, cos_mean, of its mean direction, and
        kl, in nats a picture. recall@10_prior, recall@10_sampled: how often a sample's
        own text is among its ten nearest.
        """
        device = next(model.parameters()).device
        image, evidence, centre = (
            rows.to(device) for rows in (self.image, self.evidence, self.centre)
        )
        noise = type(self.noise)(*(part.to(device) for part in self.noise))
        prior = model.prior(centre)
        found = {"cos_image": self.cosine(image), **self.sampled("prior", prior.sample(noise))}
        if hasattr(model, "posterior"):
            posterior = model.posterior(image, evidence, centre)
            found |= self.sampled("sampled", posterior.sample(noise))
            found["cos_mean"] = self.cosine(posterior.direction)
            found["kl"] = posterior.kl(prior).mean().item()
        return found

    def cosine(self, rows: Tensor) -> float:
        return (rows.cpu() * self.text).sum(1).mean().item()

    def sampled(self, name: str, rows: Tensor) -> dict[str, float]:
        truth = torch.from_numpy(np.arange(len(rows)))
        recall = retrieval_recall(rows.cpu(), self.text, truth, (10,))[10]
        return {f"cos_{name}": self.cosine(rows), f"recall@10_{name}": recall}

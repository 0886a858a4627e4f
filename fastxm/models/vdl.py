"""VDL: LAFITE whose text embedding of a picture is inferred, by variational learning.

A picture x has the embedding z in the joint space; the embedding t of its caption is hidden:

    log p(x | z) >= E_{q(t | x, z)} log p(x | t, z) - KL(q(t | x, z) || p(t | z))

LAFITE's fixed perturbation is q = p. Here q looks at the picture, through what its encoder saw
before the projection, and p learns where captions are known. Both begin as LAFITE's.

The objective, the hidden text embedding and its posterior given the picture are those of M. Kang,
D. Lee, J. Kim, S. Kim, B. Han, "Variational Distribution Learning for Unsupervised Text-to-Image
Generation", CVPR 2023, of which only the abstract was read: the families, the networks and the
schedule are a reconstruction, and no figure of this package compares with that paper's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm.models.lafite import LAFITE, LAFITEConfig
from fastxm.nn.directions import Gaussian, Heads, VonMisesFisher, concentration


@dataclass(frozen=True)
class VDLConfig(LAFITEConfig):
    """What the networks are made of.

    Args:
        image_size, ..., joint_encoder: as in `LAFITEConfig`; xi and noise are those of the prior.
        family: of prior and posterior, "gaussian" (then normalised) or "vmf".
        evidence: what the posterior sees beside the embedding: what the image "encoder" gives
            before its projection, or "none".
        evidence_width: of that.
        conditioning: what the networks are given, "text", or the "pair" of text and picture
            embedding, of which a caption alone leaves the latter zero.
    """

    family: str = "gaussian"
    evidence: str = "encoder"
    evidence_width: int = 1280
    conditioning: str = "text"

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {
            **super().choices(),
            "perturbation": ("fixed",),
            "family": ("gaussian", "vmf"),
            "evidence": ("encoder", "none"),
            "conditioning": ("text", "pair"),
        }

    @property
    def condition(self) -> int:
        return self.embedding * (2 if self.conditioning == "pair" else 1)


class VDL(LAFITE):
    """VDL: `generate` draws pictures of captions, by their text embeddings alone.

    Args:
        config: of all networks.

    Attributes:
        posterior_heads, prior_heads: shift and log scale of q and of p; zero at the start.
    """

    model_type: ClassVar[str] = "vdl"
    config_class: ClassVar[type[LAFITEConfig]] = VDLConfig
    config: VDLConfig

    def __init__(self, config: VDLConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        sees = c.embedding + (c.evidence_width if c.evidence == "encoder" else 0)
        self.posterior_heads = Heads(sees, c.embedding, c.hidden)
        self.prior_heads = Heads(c.embedding, c.embedding, c.hidden)

    def condition(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        """[B, condition]: of text [B, D]; for pairs also the picture's embedding or zeros."""
        if self.config.conditioning == "text":
            return text
        return torch.cat([text, torch.zeros_like(text) if image is None else image], 1)

    def prior(self, centre: Tensor) -> Any:
        """p(t | z) around pictures' embeddings [B, D], or where a corpus has their texts."""
        return self.around(centre, *self.prior_heads(centre))

    def posterior(self, image: Tensor, evidence: Tensor, centre: Tensor | None = None) -> Any:
        """q(t | x, z) of embeddings [B, D] and evidence [B, evidence_width] of pictures.

        It is around `centre` [B, D] as p is, by default around the embeddings.

        Raises:
            ValueError: their widths are not the config's.
        """
        c = self.config
        if image.shape[1] != c.embedding:
            raise ValueError(f"embeddings are [B, {c.embedding}], not {tuple(image.shape)}")
        centre = image if centre is None else centre
        if c.evidence == "none":
            return self.around(centre, *self.posterior_heads(image))
        if evidence.shape != (len(image), c.evidence_width):
            expected = [len(image), c.evidence_width]
            raise ValueError(f"evidence is {expected}, not {tuple(evidence.shape)}")
        return self.around(centre, *self.posterior_heads(torch.cat([image, evidence], 1)))

    def around(self, centre: Tensor, shift: Tensor, log_scale: Tensor) -> Any:
        """The family's member near a centre: at no shift and scale LAFITE's."""
        if self.config.family == "gaussian":
            return Gaussian(centre + shift, self.config.xi * log_scale.exp())
        cosine = centre.new_full((), 1 + self.config.xi**2).rsqrt()
        k = concentration(cosine, centre.shape[1])
        # a wider posterior is a less concentrated one
        return VonMisesFisher(
            F.normalize(centre + shift, dim=1), k * (-2 * log_scale.mean(1)).exp()
        )

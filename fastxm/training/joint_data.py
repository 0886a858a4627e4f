"""A joint encoder, the pictures that a generator learns from with it, and those it is measured on.

Without an encoder of the user's, one is trained on a share of the data that leaves the generator's
captions out (`fastxm.data.leak_free`); the split is printed. `Embeddings` are of both.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm.data import CaptionedImages, open_dataset
from fastxm.data.folder import utf8
from fastxm.data.image_features import image_features
from fastxm.data.leak_free import leak_free
from fastxm.data.subsets import principal
from fastxm.encoders import joint_encoder
from fastxm.encoders.dual import DualEncoderConfig
from fastxm.encoders.frozen import fingerprint
from fastxm.training.dual_encoder import DualEncoderTraining, cached_dual_encoder
from fastxm.training.embeddings import Embeddings, embed_captions
from fastxm.training.ranks import Ranks

OF_ENCODER = "encoder"


class Corpus:
    """Texts that no picture is tied to, among which those of pictures are looked for.

    An encoder trained by InfoNCE at temperature tau has exp(cos(z, t) / tau) proportional to
    p(t | z) / p(t) (van den Oord et al. 2018). Of texts t_k drawn from p(t), the mean text of z is
    then the sum of softmax_k(cos(z, t_k) / tau) t_k: the projection of DeCap (Li et al. 2023).

    Args:
        text: [K, D], unit rows.
        temperature: tau, the encoder's.
    """

    def __init__(self, text: Tensor, temperature: float) -> None:
        self.text, self.temperature = text, temperature

    def __call__(self, image: Tensor) -> Tensor:
        """Directions of the mean texts [N, D] of pictures' embeddings [N, D], unit rows."""
        text = self.text.to(image)[None, None]
        mean = F.scaled_dot_product_attention(
            image[None, None], text, text, scale=1 / self.temperature
        )
        return F.normalize(mean[0, 0], dim=1)


class JointData:
    """What LAFITE and VDL learn from.

    Args:
        config: a `LAFITETraining` or what is made of it.
        device: of the encoder.
        ranks: of several processes the first tells what there is.

    Attributes:
        encoder: the frozen joint encoder. fingerprint: of its weights.
        train, held_out: pictures, with the captions that they have.
        embed: `Embeddings` of pictures, by this encoder and around this corpus.

    Raises:
        ValueError: the encoder's width is not the model's; the corpus has no text.
        FileNotFoundError: there is no such corpus.
    """

    def __init__(self, config: Any, device: torch.device, ranks: Ranks | None = None) -> None:
        self.pairs: CaptionedImages | None = None  # of the encoder, where it is trained here
        self.device, self.tells = device, (ranks or Ranks()).first
        self.train, self.held_out = self.open(config)
        self.encoder = self.open_encoder(config).to(device)
        self.fingerprint = fingerprint(self.encoder)
        if not config.encoder:
            # the other style's own mean and spread, for which no caption is needed
            pictures = self.train.select(principal(self.train))
            self.encoder.standardise(image_features(pictures, self.encoder.image_encoder))
        if self.encoder.width != config.model.embedding:
            raise ValueError(
                f"{config.encoder} gives embeddings of width {self.encoder.width}, "
                f"the configuration has embedding {config.model.embedding}"
            )
        named = config.corpus
        if named == "auto":
            named = "" if config.encoder else OF_ENCODER
        corpus = self.open_corpus(named) if named else None
        self.embed = partial(Embeddings, encoder=self.encoder, corpus=corpus)

    def open(self, config: Any) -> tuple[CaptionedImages, CaptionedImages]:
        """Pictures to train on and held-out ones; says what they are."""
        split = config.split
        if split == "auto":
            split = "all" if config.encoder else "styles"
        size = config.model.image_size
        if split != "all":
            parts = leak_free(config.data, size, parted=split == "concepts")
            self.tell(*parts.lines())
            self.pairs = parts.encoder
            return parts.generator, parts.held_out
        train, held_out = (
            open_dataset(config.data, size, part, uncaptioned=True) for part in ("train", "val")
        )
        with_text = sum(map(bool, train.captions))
        self.tell(f"{len(train)} pictures, {with_text} with captions")
        return train, held_out

    def open_encoder(self, config: Any) -> Any:
        """The encoder: given, or trained on its share of the data."""
        if config.encoder:
            return joint_encoder(config.encoder)
        made_of = DualEncoderConfig(
            image_encoder_size=config.encoder_size, width=config.model.embedding
        )
        split: Any = "styles" if config.split == "auto" else config.split
        size = config.model.image_size
        training = DualEncoderTraining(made_of, config.data, size, split, epochs=16)
        return cached_dual_encoder(training).requires_grad_(False)

    @torch.no_grad()
    def open_corpus(self, name: str) -> Corpus:
        """Of a file, a caption a line, or of the captions that the encoder learnt from."""
        if name == OF_ENCODER:
            assert self.pairs is not None
            text = embed_captions(self.pairs, self.encoder)
        else:
            if not Path(name).is_file():
                raise FileNotFoundError(f"corpus: there is no file {name}")
            with utf8(Path(name)):
                lines = Path(name).read_text(encoding="utf-8").splitlines()
            texts = sorted(filter(None, map(str.strip, lines)), key=len)  # of like lengths together
            if not texts:
                raise ValueError(
                    f"corpus: {name} has no caption, of which it is to have one a line"
                )
            parts = [texts[i : i + 256] for i in range(0, len(texts), 256)]
            text = torch.cat([self.encoder.embed_text(part).cpu() for part in parts])
        self.tell(f"corpus: {len(text)} texts, of no picture")
        return Corpus(text, self.encoder.temperature)

    def tell(self, *lines: str) -> None:
        if self.tells:
            print(*lines, sep="\n", file=sys.stderr, flush=True)

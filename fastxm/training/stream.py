"""STREAM's training: each word of a caption from the picture and the words before it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastxm.data.image_features import image_features
from fastxm.data.vocabulary import split_words
from fastxm.evaluation.text import bleu, common_words, perplexity, shared_words
from fastxm.models.stream import STREAM, STREAMConfig
from fastxm.training.batches import Batch
from fastxm.training.captions import CaptionRecipe, CaptionTraining, chosen, with_words


@dataclass(frozen=True, kw_only=True)
class STREAMTraining(CaptionTraining):
    """Everything that decides a training of STREAM."""

    model: STREAMConfig = field(default_factory=STREAMConfig)
    batch_size: int = 128
    """Pairs in an update, of all processes together."""
    lr: float = 1e-3
    """Adam's first step."""


class STREAMRecipe(CaptionRecipe):
    """STREAM as the loop sees it."""

    system = "stream"
    spans = True
    model: STREAM
    config: STREAMTraining

    def make(self, vocabulary: tuple[str, ...]) -> STREAM:
        return STREAM(with_words(self.config.model, vocabulary))

    def eye(self) -> Any:
        name, width = self.config.model.image_encoder, self.config.model.image_width
        if self.model.image_encoder.width != width:
            found = self.model.image_encoder.width
            raise ValueError(f"{name} has image_width {found}, the configuration {width}")
        return self.model.image_encoder

    def losses(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        tokens, lengths = batch["tokens"], batch["lengths"]
        # what was not told has to be seen in the picture
        given, group = batch.get("hidden"), self.ranks.group
        return {"loss": self.model.loss(features, tokens, lengths, given=given, group=group)}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Perplexity of first captions of held-out pictures; BLEU-1 and words of what it writes."""
        if len(self.held) == 0:
            return {}
        held = chosen(self.held)
        whole = image_features(held, self.sight).to(self.device)
        tokens, lengths = self.vocabulary.encode(
            [c[0] for c in held.captions], self.config.model.words
        )
        self.model.eval()
        nll = self.model.nll(whole, tokens.to(self.device), lengths.to(self.device))
        written = self.vocabulary.decode(self.model.search(whole, 1, 20))
        self.model.train()
        references = [[split_words(c) for c in captions] for captions in held.captions]
        common = common_words([caption for captions in references for caption in captions])
        told = [text.split() for text in written]
        return {
            "perplexity": perplexity(nll, lengths),
            "BLEU-1": bleu(told, references, 1),
            "shared_words": shared_words(told, references, common),
        }

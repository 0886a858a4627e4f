"""The text autoencoder's training: a caption is said again from its code, word by word."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastxm.data import CaptionedImages, open_dataset
from fastxm.data.subsets import captions_alone, principal
from fastxm.data.vocabulary import Vocabulary
from fastxm.data.word_vectors import word_vectors
from fastxm.models.text_autoencoder import TextAutoencoder, TextAutoencoderConfig, text_loss
from fastxm.training.batches import place
from fastxm.training.draws import Draws
from fastxm.training.precision import pick_device, seed_all
from fastxm.training.recipe import Player, Recipe
from fastxm.training.trainer import LoopConfig

SHOWN, JUDGED = 32, 512  # held-out captions in reconstructions.txt, and in the figures


@dataclass(frozen=True)
class TextTraining:
    """What decides a training of the text autoencoder."""

    model: TextAutoencoderConfig = field(default_factory=TextAutoencoderConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    batch_size: int = 128
    """Captions in an update."""
    lr: float = 1e-3
    """Adam's step."""
    forced: float = 0.0
    """Probability that the decoder reads the true last word and not its own (0: released code)."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    min_count: int = 1
    """How often a word comes in the captions, at least, to be in the vocabulary."""
    word_vectors: Path | None = None
    """A GloVe text file of the vectors of words, which then are not trained."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.forced <= 1:
            raise ValueError(f"forced is a probability, not {self.forced}")


class TextRecipe(Recipe):
    """The text autoencoder as the loop sees it.

    Args:
        config: of the training.
        data: "emoji", or a folder or tar shards of captioned pictures,
            of which the pictures are not read.
        device: auto, cpu or cuda.
        seed: of weights and the order of captions.
        image_size: of the pictures in whose cache the captions are.
    """

    system = "text-autoencoder"
    batches: Draws
    unbound = ("loop",)

    def __init__(
        self, config: TextTraining, data: str, device: str, seed: int, image_size: int
    ) -> None:
        self.config, self.data, self.seed, self.image_size = config, data, seed, image_size
        self.device = pick_device(device)
        self.images_per_step = config.batch_size

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "data": self.data, "seed": self.seed}

    def build(self) -> None:
        config = self.config
        seed_all(self.seed, self.device)
        train, self.val = (self.open(split) for split in ("train", "val"))
        texts, weights = captions_alone(train)
        words = config.model.vocabulary or Vocabulary.of(texts, config.min_count).words
        self.model = TextAutoencoder(replace(config.model, vocabulary=words)).to(self.device)
        if config.word_vectors is not None:
            known, width = self.model.vocabulary, config.model.word_width
            vectors, _ = word_vectors(config.word_vectors, known, width)
            self.model.words.weight.data.copy_(vectors)
            self.model.words.requires_grad_(False)
        self.tokens, self.lengths = (t.cpu() for t in self.model.tokens(texts))
        self.batches = Draws(weights, config.batch_size, seed=self.seed)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, config.lr, fused=True)
        self.players = {"autoencoder": Player(self.model, optimizer)}

    def open(self, split: str) -> CaptionedImages:
        """The principal pictures of a split, for their captions."""
        whole = open_dataset(self.data, self.image_size, split)
        return whole.select(principal(whole))

    def step(self, batch: Tensor) -> dict[str, Tensor]:
        lengths, order = self.lengths[batch].sort(descending=True, stable=True)
        tokens = place(self.tokens[batch[order], : int(lengths[0])], self.device)
        player = self.players["autoencoder"]
        loss, accuracy = text_loss(*self.model(tokens, lengths, self.config.forced))
        player.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        player.optimizer.step()
        return {"loss": loss.detach(), "perplexity": loss.detach().exp(), "accuracy": accuracy}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Perplexity and accuracy of words that the decoder says after its own."""
        if not len(self.val):
            return {}
        tokens, lengths = self.model.tokens(spread(self.val, JUDGED))
        loss, accuracy = text_loss(*self.model(tokens, lengths))
        return {"perplexity": loss.exp().item(), "accuracy": accuracy.item()}

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        if len(self.val):
            captions = spread(self.val, SHOWN)
            said = self.model.say(self.model.embed(captions))
            lines = [f"{caption}\n    {again}\n" for caption, again in zip(captions, said)]
            (directory / "reconstructions.txt").write_text("".join(lines))


def spread(dataset: CaptionedImages, count: int) -> list[str]:
    """Captions of pictures spread over a data set, first ones and later ones in turn."""
    rows = [len(dataset) * k // count for k in range(min(count, len(dataset)))]
    return [dataset.captions[i][k % len(dataset.captions[i])] for k, i in enumerate(rows)]

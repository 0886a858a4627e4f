"""STREAM: describes a picture in words, by an LSTM that is given the picture first.

    x[-1] = image        x[t] = embedding of word t        p[t + 1] = softmax(LSTM(x[t]))

So p[0], of the first word, comes of the picture alone, which is the start of the sentence; its end
is a word too, number 0, predicted after the last.
(T. Qiao et al. MirrorGAN, CVPR 2019, section 3.3.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.data.vocabulary import END, UNKNOWN, Vocabulary
from fastxm.encoders.frozen import Looks
from fastxm.models.pretrained import Pretrained
from fastxm.nn.batch_norm import BatchNorm1d


@dataclass(frozen=True)
class STREAMConfig:
    """What the captioner is made of.

    Args:
        vocabulary: its words; empty, those of the data that it trains on.
        words: T, word slots of a caption that it learns from; later words are left out.
        embedding: width of picture and words before the LSTM.
        hidden: width of the LSTM.
        image_encoder: name or path for `fastxm.encoders.image_encoder`.
        image_encoder_size: side that pictures are resized to for it.
        image_width: channels of its pooled features.
        dropout: of picture, words and LSTM states, in training (none in the published code).
    """

    vocabulary: tuple[str, ...] = ()
    words: int = 18
    embedding: int = 256
    hidden: int = 512
    image_encoder: str = "efficientnet-lite0"
    image_encoder_size: int = 224
    image_width: int = 1280
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("words", "embedding", "hidden", "image_encoder_size", "image_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is in [0, 1), not {self.dropout}")


class STREAM(Looks, Pretrained):
    """The captioner: `caption` writes, `nll` judges a text that is given.

    Args:
        config: with a vocabulary.
    """

    model_type: ClassVar[str] = "stream"
    config_class: ClassVar[type[STREAMConfig]] = STREAMConfig

    def __init__(self, config: STREAMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.vocabulary)
        self.image = nn.Linear(config.image_width, config.embedding)
        self.norm = BatchNorm1d(config.embedding, momentum=0.01)
        self.embedding = nn.Embedding(len(self.vocabulary), config.embedding)
        self.lstm = nn.LSTM(config.embedding, config.hidden, batch_first=True)
        self.word = nn.Linear(config.hidden, len(self.vocabulary))
        self.dropout = nn.Dropout(config.dropout)

    def train(self, mode: bool = True) -> "STREAM":
        """The LSTM, which has no dropout, stays in training mode: cuDNN differentiates no other."""
        super().train(mode)
        self.lstm.train()
        return self

    def start(self, whole: Tensor) -> Tensor:
        """Pooled features [B, image_width] as the LSTM's first input: [B, 1, embedding]."""
        return self.dropout(self.norm(self.image(self.dropout(whole))))[:, None]

    def nll(
        self, whole: Tensor, tokens: Tensor, lengths: Tensor, *, given: Tensor | None = None
    ) -> Tensor:
        """How surprised it is by each word of a text, its end among them.

        Args:
            whole: [B, image_width], pooled features of the pictures.
            tokens: [B, T], numbered words, 0 after the last.
            lengths: [B], 1 to T.
            given: [B, T], the words that it is told before each; `tokens` if not given.

        Returns:
            [B, T + 1] in nats, 0 after the end.
        """
        words = self.embedding(tokens if given is None else given)
        inputs = torch.cat([self.start(whole), self.dropout(words)], 1)
        targets = F.pad(tokens, (0, 1), value=END)  # [B, T + 1]
        states, _ = self.lstm(inputs)
        there = torch.arange(targets.shape[1], device=tokens.device) <= lengths[:, None]
        logits = self.word(self.dropout(states[there]))  # of what is there alone: [n, V]
        found = F.cross_entropy(logits.float(), targets[there], reduction="none")
        return found.new_zeros(targets.shape).masked_scatter(there, found)

    def loss(
        self,
        whole: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        *,
        given: Tensor | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> Tensor:
        """The mean of `nll` over all words and ends, as the published code takes it.

        Args:
            whole, tokens, lengths, given: as of `nll`.
            group: a torch.distributed group, whose ranks each give texts of their own: the average
                of their losses is the mean over the words of all.
        """
        words = (lengths + 1).sum()
        if group is not None:
            dist.all_reduce(words, group=group)
            words = words / dist.get_world_size(group)
        return self.nll(whole, tokens, lengths, given=given).sum() / words

    @torch.no_grad()
    def caption(
        self, images: Tensor, *, beams: int = 1, max_words: int = 20, batch_size: int = 64
    ) -> list[str]:
        """Describes pictures.

        Args:
            images: [B, 3, H, W] in [0, 1].
            beams: texts that are followed at once; 1 takes the likeliest word at every place.
                Texts compare by the mean log probability of their words and end.
            max_words: after so many a text ends.
            batch_size: pictures at once.

        Returns:
            B texts; none holds the unknown word.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"caption needs images [B, 3, H, W], not {tuple(images.shape)}")
        for name, count in {"beams": beams, "max_words": max_words}.items():
            if count < 1:
                raise ValueError(f"{name} is at least 1, not {count}")
        training = self.training
        self.eval()
        try:
            texts = []
            for part in images.split(batch_size):
                whole = self.image_encoder(part.to(self.device))
                texts += self.vocabulary.decode(self.search(whole, beams, max_words))
            return texts
        finally:
            self.train(training)

    def search(self, whole: Tensor, beams: int, max_words: int) -> Tensor:
        """Beam search from pooled features [B, image_width]; the best text's numbers [B, L]."""
        B = len(whole)
        state: tuple[Tensor, Tensor] | None = None
        inputs = self.start(whole).repeat_interleave(beams, 0)  # [B beams, 1, embedding]
        texts = torch.zeros(B, beams, 0, dtype=torch.int64, device=whole.device)
        # of the texts of a picture, which are the same at first, one counts
        score = whole.new_full((B, beams), -torch.inf)
        score[:, 0] = 0
        done = torch.zeros(B, beams, dtype=torch.bool, device=whole.device)
        length = whole.new_zeros(B, beams)
        for place in range(max_words + 1):
            states, state = self.lstm(inputs, state)
            chance = self.word(states[:, 0]).float().log_softmax(1).view(B, beams, -1)
            chance[..., UNKNOWN] = -torch.inf
            if place == max_words:  # nothing but the end is left
                chance[..., END + 1 :] = -torch.inf
            chance[done] = -torch.inf
            chance[..., END].masked_fill_(done, 0.0)  # a text that has ended stays as it is
            longer = score[..., None] + chance  # [B, beams, V]
            counts = length + ~done
            # an ended text competes with what the others may become, by its mean
            mean = longer / counts[..., None].clamp(min=1)
            best = mean.flatten(1).topk(beams, 1).indices
            beam, word = best // mean.shape[2], best % mean.shape[2]
            score = longer.flatten(1).gather(1, best)
            length, done = counts.gather(1, beam), done.gather(1, beam) | (word == END)
            kept = texts.gather(1, beam[..., None].expand(-1, -1, texts.shape[2]))
            texts = torch.cat([kept, word[..., None]], 2)
            if done.all():
                break
            rows = (torch.arange(B, device=whole.device)[:, None] * beams + beam).flatten()
            state = (state[0][:, rows], state[1][:, rows])
            inputs = self.embedding(word.flatten())[:, None]
        return texts[:, 0]

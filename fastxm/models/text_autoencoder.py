"""Captions as vectors, and back: a bidirectional LSTM, its maximum over time, and an LSTM.

    code = max_t [forward_t, backward_t]        h_0 = code, c_0 = 0        p_t = softmax(W h_t)

Both read a caption's words; the encoder then its end, the decoder before them a start. The decoder
reads its own last word, in training too (the released code of Das & Saha, arXiv:2112.04928), or
with some probability the true one (teacher forcing).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastxm.data.vocabulary import END, Vocabulary
from fastxm.models.pretrained import Pretrained


@dataclass(frozen=True)
class TextAutoencoderConfig:
    """What the networks are made of."""

    vocabulary: tuple[str, ...] = ()
    """The words; in training those of the captions if there are none."""
    words: int = 73
    """Word slots of a caption."""
    word_width: int = 100
    """E, of a word's vector."""
    code: int = 100
    """Width of a caption's code, even."""
    padding: Literal["masked", "reference"] = "masked"
    """The maximum is over the words; "reference" has zeros for padding in it (released code)."""

    def __post_init__(self) -> None:
        for name, least in {"words": 1, "word_width": 1, "code": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")
        if self.code % 2:
            raise ValueError(f"code is even, half of it for each direction, not {self.code}")
        if self.padding not in ("masked", "reference"):
            raise ValueError(f"padding is masked or reference, not {self.padding!r}")


class TextAutoencoder(Pretrained):
    """Captions to codes and codes to captions.

    Args:
        config: of both networks; it names the words.
    """

    model_type: ClassVar[str] = "text-autoencoder"
    config_class: ClassVar[type[TextAutoencoderConfig]] = TextAutoencoderConfig

    def __init__(self, config: TextAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.vocabulary)
        self.words = nn.Embedding(len(self.vocabulary), config.word_width)
        self.start = nn.Parameter(torch.randn(config.word_width))
        half = config.code // 2
        self.encoder = nn.LSTM(config.word_width, half, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTMCell(config.word_width, config.code)
        self.output = nn.Linear(config.code, len(self.vocabulary))

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as numbers, each with its end: tokens int64 [B, T], lengths int64 [B]."""
        tokens, lengths = self.vocabulary.encode(captions, self.config.words)
        tokens, lengths = F.pad(tokens, (0, 1), value=END), lengths + 1
        return tokens[:, : int(lengths.max())].to(self.device), lengths

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Codes of captions.

        Args:
            tokens: int64 [B, T].
            lengths: int64 [B] on the CPU, tokens of each caption with its end; T the largest.

        Returns:
            [B, code], within (-1, 1).
        """
        words = self.words(tokens)  # [B, T, E]
        ordered = bool((lengths.diff() <= 0).all())  # else indices go to the GPU and back
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=ordered)
        beyond = -torch.inf if self.config.padding == "masked" else 0.0
        out, _ = pad_packed_sequence(self.encoder(packed)[0], True, beyond)  # [B, T, code]
        return out.amax(1)

    def next(self, word: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """Logits [B, V] of what follows the word vectors [B, E], and the decoder's next state."""
        state = self.decoder(word, state)
        return self.output(state[0]), state

    def forward(
        self, tokens: Tensor, lengths: Tensor, forced: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Says captions again from their codes; what a caption has no word for is not computed.

        Args:
            tokens, lengths: as of `encode`; a GPU waits for nothing if they fall in length.
            forced: probability that a step reads the true last words, and not the likeliest ones by
                the decoder itself. No gradient goes through that choice.

        Returns:
            logits [P, V] of the P words and ends of all captions, and what they are, int64 [P].
        """
        if (lengths.diff() > 0).any():
            lengths, order = lengths.sort(descending=True, stable=True)
            tokens = tokens[order.to(tokens.device)]
        code = self.encode(tokens, lengths)
        state, word = (code, torch.zeros_like(code)), self.start.expand(len(code), -1)
        told = torch.rand(tokens.shape[1]).tolist() if forced else [1.0] * tokens.shape[1]
        true_words, out, truth = self.words(tokens).unbind(1), [], []
        for t in range(tokens.shape[1]):
            count = int((lengths > t).sum())  # captions as long as this
            state = self.decoder(word[:count], (state[0][:count], state[1][:count]))
            out.append(state[0])
            truth.append(tokens[:count, t])
            word = true_words[t] if told[t] < forced else self.words(self.likeliest(state[0]))
        return self.output(torch.cat(out)), torch.cat(truth)

    @torch.no_grad()
    def likeliest(self, out: Tensor) -> Tensor:
        """The likeliest words int64 [B] by the decoder's outputs [B, code]."""
        return self.output(out).argmax(1)

    @torch.no_grad()
    def embed(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Codes [N, code] of N captions, a few at a time.

        With padding "reference" a caption's code depends on the longest of its batch.
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError("a text autoencoder takes a list of captions (str)")
        starts = range(0, len(captions), batch_size)
        parts = [self.encode(*self.tokens(captions[i : i + batch_size])) for i in starts]
        return torch.cat(parts) if parts else torch.zeros(0, self.config.code, device=self.device)

    @torch.no_grad()
    def say(self, codes: Tensor, *, batch_size: int = 256) -> list[str]:
        """The captions of codes [N, code], the likeliest word at each step."""
        if codes.ndim != 2 or codes.shape[1] != self.config.code:
            raise ValueError(f"codes are [N, {self.config.code}], not {tuple(codes.shape)}")
        parts = [self.greedy(part) for part in codes.to(self.device).split(batch_size)]
        return [caption for part in parts for caption in self.vocabulary.decode(part)]

    def greedy(self, code: Tensor) -> Tensor:
        """Tokens int64 [B, T] of codes [B, code], until each has ended."""
        state, said = (code, torch.zeros_like(code)), []
        word = self.start.expand(len(code), -1)
        ended = torch.zeros(len(code), dtype=torch.bool, device=code.device)
        for _ in range(self.config.words + 1):
            logits, state = self.next(word, state)
            said.append(logits.argmax(1))
            word = self.words(said[-1])
            ended |= said[-1] == END
            if ended.all():
                break
        return torch.stack(said, 1)


def text_loss(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """How well words were said.

    Args:
        logits: [P, V], as of `TextAutoencoder`.
        truth: int64 [P].

    Returns:
        scalars: the mean cross-entropy in nats, float32, whose exponential is the perplexity; and
        the share of words that are the likeliest ones.
    """
    loss = F.cross_entropy(logits.float(), truth)
    return loss, (logits.argmax(1) == truth).float().mean()

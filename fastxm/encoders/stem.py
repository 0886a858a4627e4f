"""STEM: captions to words and sentence by a bidirectional LSTM with a vocabulary of its own.

(T. Qiao et al. MirrorGAN, CVPR 2019, section 3.1; the text encoder of AttnGAN, Xu et al. 2018.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastxm.data.vocabulary import Vocabulary
from fastxm.encoders.bert import TextBatch
from fastxm.nn.text import both_ways


@dataclass(frozen=True)
class STEMConfig:
    """What the text encoder is made of.

    Args:
        vocabulary: its words; empty, those of the data that it trains on.
        words: T, word slots of a caption; later words are left out.
        embedding: width of a word before the LSTM.
        width: E, of words and sentence: half of it a direction.
        dropout: of the embedded words, in training.
    """

    vocabulary: tuple[str, ...] = ()
    words: int = 18
    embedding: int = 300
    width: int = 256
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("words", "embedding", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.width % 2:
            raise ValueError(f"width is even, half of it for each direction, not {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is in [0, 1), not {self.dropout}")


class STEM(nn.Module):
    """Captions to a `TextBatch` of words [B, T, E], sentence [B, E] and lengths [B].

    Args:
        config: with a vocabulary.

    Raises:
        ValueError: the vocabulary is empty.
    """

    def __init__(self, config: STEMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.vocabulary)
        self.width, self.max_length = config.width, config.words
        self.embedding = nn.Embedding(len(self.vocabulary), config.embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            config.embedding, config.width // 2, batch_first=True, bidirectional=True
        )

    def forward(self, captions: Sequence[str]) -> TextBatch:
        """Features of B captions; what the vocabulary does with them is said there."""
        tokens, lengths = self.vocabulary.encode(captions, self.max_length)
        device = self.embedding.weight.device
        return self.read(tokens.to(device), lengths.to(device))

    def read(self, tokens: Tensor, lengths: Tensor) -> TextBatch:
        """Features of numbered words.

        Args:
            tokens: [B, T] integers.
            lengths: [B], 1 to T.

        Returns:
            words, zero beyond the length; the sentence is the forward direction at the last word
            beside the backward direction at the first.
        """
        words, sentence = both_ways(self.lstm, self.dropout(self.embedding(tokens)), lengths)
        return TextBatch(words, sentence, lengths)

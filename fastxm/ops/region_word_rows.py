"""Rows of region-word scores: their norms, and the words of all texts without their padding."""

import torch
from torch import Tensor

from fastxm.ops.region_word_reference import EPS, valid_words


def norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., 1]: the norms of rows, at least 1e-6."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype).clamp_min_(EPS**0.5)


def through_norms(grad: Tensor, unit: Tensor, norm: Tensor) -> None:
    """Turns the gradient of unit rows into that of the rows, unit * norm."""
    along = (grad * unit).sum(-1, keepdim=True)
    along.masked_fill_(norm <= EPS**0.5, 0)  # there a row was not brought to norm 1
    grad.addcmul_(along, unit, value=-1).div_(norm)


class Texts:
    """The words of all texts, one after the other: those of text t from starts[t] on.

    Their number starts[-1] is K if they are `counted`. A GPU is not waited for: there K is all that
    could be, and the places behind the words are of none.
    """

    def __init__(self, words: Tensor, lengths: Tensor, *, counted: bool | None = None):
        T = words.shape[1]
        self.counted = not words.is_cuda if counted is None else counted
        self.valid = valid_words(words, lengths)  # [B_text, T]
        self.starts = torch.nn.functional.pad(self.valid.sum(1).cumsum(0), (1, 0))
        flat = self.valid.flatten()
        if self.counted:
            self.order = flat.nonzero()[:, 0]
        else:
            self.order = flat.int().argsort(descending=True, stable=True)
        self.K, self.text = len(self.order), self.order // T
        places = self.starts[:-1, None] + torch.arange(T, device=words.device)
        self.places = places.clamp_max(max(0, self.K - 1))  # [B_text, T]

    def pack(self, words: Tensor) -> Tensor:
        """[B_text, T, ..] -> [K, ..]"""
        return words.flatten(0, 1)[self.order]

    def unpack(self, packed: Tensor, padding: float = 0.0) -> Tensor:
        """[K, ..] -> [B_text, T, ..]"""
        if self.K == 0:
            return packed.new_full((*self.valid.shape, *packed.shape[1:]), padding)
        valid = self.valid.view(*self.valid.shape, *(1,) * (packed.ndim - 1))
        return torch.where(valid, packed[self.places], padding)

    def pool(self, cosines: Tensor, sharpness: float) -> Tensor:
        """Scores [B_text, P] of cosines [P, K]."""
        logits = self.unpack(sharpness * cosines.T, -torch.inf)
        return logits.logsumexp(1) / sharpness

    def pool_bwd(self, dscores: Tensor, cosines: Tensor, sharpness: float) -> Tensor:
        """The gradient of cosines [P, K]; 0 at places of no word."""
        weights = self.unpack(sharpness * cosines.T, -torch.inf).softmax(1)
        dcosines = torch.where(self.valid[..., None], dscores[:, None] * weights, 0)
        return self.pack(dcosines).T.contiguous()

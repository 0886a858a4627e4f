"""Text features as networks take them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SCALES = ("raw", "unit")


def scaled(text: Tensor, scale: str) -> Tensor:
    """Features [..., E] as they are ("raw"), or with a mean square of 1 ("unit"); zeros stay zeros.

    Beside noise of variance 1, features that are much smaller are not seen for many steps.
    """
    return text if scale == "raw" else F.normalize(text, dim=-1) * math.sqrt(text.shape[-1])


def both_ways(lstm: nn.LSTM, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What a bidirectional LSTM makes of texts of different lengths.

    A packed sequence wants lengths on the CPU, and a GPU would be waited for; there the LSTM reads
    each text twice, from the left and from the right end of its row, and each direction is taken
    from where it begins with the text.

    Args:
        lstm: of one layer, batch first, of H a direction.
        words: [B, T, E].
        lengths: [B], 1 to T, on the same device.

    Returns:
        states [B, T, 2H], 0 beyond the length; and [B, 2H], forward's at the last word beside
        backward's at the first.
    """
    if words.is_cuda:
        return _from_both_ends(lstm, words, lengths)
    packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
    states, (last, _) = lstm(packed)
    states, _ = pad_packed_sequence(states, batch_first=True, total_length=words.shape[1])
    return states, last.transpose(0, 1).flatten(1)


def _from_both_ends(lstm: nn.LSTM, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    T, H = words.shape[1], lstm.hidden_size
    place, ends = torch.arange(T, device=words.device), lengths[:, None]

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return x.gather(1, ((place + by) % T)[..., None].expand(-1, -1, x.shape[2]))

    left, right = lstm(torch.cat([words, turned(words, ends)]))[0].chunk(2)
    states = torch.cat([left[..., :H], turned(right[..., H:], T - ends)], 2)
    forward = states[..., :H].take_along_dim((ends - 1)[..., None], 1)[:, 0]
    states = states.masked_fill((place >= ends)[..., None], 0.0)
    return states, torch.cat([forward, states[:, 0, H:]], 1)

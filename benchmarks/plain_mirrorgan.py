"""MirrorGAN in plain PyTorch, as the released code computes it: the baseline of its training.

The same weights and results. Upsampling stays apart from convolution, attention to words keeps its
logits and weights of every place, and the word loss goes through the captions one by one, each
against all pictures, as AttnGAN's does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.models.mirrorgan import GlobalLocalAttention, present
from fastxm.nn.blocks import Conv2d, upsample


def plain(model: nn.Module) -> None:
    """Makes the networks of a MirrorGAN plain, in place."""
    for module in model.modules():
        # the classes add no state: the modules keep their weights
        module.__class__ = PLAIN.get(type(module), type(module))


class PlainConv2d(Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = upsample(x, self.up)
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class PlainAttention(GlobalLocalAttention):
    def forward(self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor) -> Tensor:
        B, C, H, W = x.shape
        keys = self.word(words)  # [B, T, C]
        logits = (x.flatten(2).transpose(1, 2) @ keys.transpose(1, 2)).flatten(0, 1)  # [B N, T]
        mask = ~present(words, lengths).repeat_interleave(H * W, 0)
        weights = logits.float().masked_fill(mask, -torch.inf).softmax(1).to(keys.dtype)
        local = (weights.view(B, H * W, -1) @ keys).transpose(1, 2).reshape(B, C, H, W)
        sentence = self.sentence(condition)[:, :, None, None].repeat(1, 1, H, W).to(x.dtype)
        gate = self.gate(x * sentence).float().softmax(1).to(x.dtype)
        return torch.cat([local.to(x.dtype), sentence * gate], 1)


PLAIN = {Conv2d: PlainConv2d, GlobalLocalAttention: PlainAttention}


def damsm_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    image: Tensor,
    sentence: Tensor,
    *,
    labels: Tensor,
    group: None = None,
) -> tuple[Tensor, Tensor]:
    """AttnGAN's word and sentence losses, of one process."""
    columns = []
    for text, length in zip(words, lengths.tolist()):
        text = text[:length].expand(len(regions), -1, -1)  # [B, n, D]
        attention = (regions @ text.transpose(1, 2)).softmax(2)  # [B, R, n]
        attention = (4 * attention.transpose(1, 2)).softmax(2)  # [B, n, R]
        cosines = F.cosine_similarity(attention @ regions, text, dim=2)
        columns.append((5 * cosines).exp().sum(1).log())
    matched = F.normalize(image, dim=1) @ F.normalize(sentence, dim=1).T
    same = (labels[:, None] == labels) & ~torch.eye(
        len(labels), dtype=torch.bool, device=labels.device
    )
    return both_ways(10 * torch.stack(columns, 1), same), both_ways(10 * matched, same)


def both_ways(scores: Tensor, same: Tensor) -> Tensor:
    scores = scores.float().masked_fill(same, -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)

"""XMC-GAN in plain PyTorch, as the released code computes it: the baseline of the training.

The same weights and results, none of the rearrangements: every condition map is upsampled and
projected by 1 x 1 convolutions at full size, pooling and upsampling stay apart from convolutions.
"""

import torch
from bench_region_word import eager as region_word_scores
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.nn.blocks import DownBlock, FirstDownBlock, UpBlock, upsample
from fastxm.nn.modulation import AttentionalModulation, ModulatedNorm
from fastxm.nn.spectral import EPS, Spectral, SpectralConv2d, SpectralLinear, unit
from fastxm.ops.dispatch import wide


def plain(model: nn.Module) -> None:
    """Makes the networks of an XMC-GAN plain, in place."""
    for module in model.modules():
        # the classes add no state: the modules keep their weights
        module.__class__ = PLAIN.get(type(module), type(module))


class PlainAttention(AttentionalModulation):
    """Attended words and condition as a map, for each layer to upsample and project."""

    def forward(self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor) -> list:
        queries = F.normalize(self.query(x).flatten(2).transpose(1, 2), dim=2)  # [B, hw, E]
        words = F.normalize(words, dim=2).to(queries.dtype)
        padding = torch.arange(words.shape[1], device=words.device) >= lengths[:, None]
        logits = self.sharpness * wide(queries @ words.transpose(1, 2))[0]
        attention = logits.masked_fill(padding[:, None], -1e9).softmax(2).to(words.dtype)
        context = (attention @ words).transpose(1, 2).unflatten(2, x.shape[2:])
        shared = condition[:, :, None, None].expand(-1, -1, *x.shape[2:]).to(context.dtype)
        maps = {x.shape[2]: torch.cat([context, shared], 1)}  # by side
        channels = self.tables.channels
        weights = self.tables.weight[:, :, None, None].split(2 * channels)
        projections = list(zip(weights, self.tables.bias.split(2 * channels)))
        n = len(channels)
        return [(maps, pair) for pair in zip(projections[:n], projections[n:])]


class PlainNorm(ModulatedNorm):
    """Batch norm, then gamma and beta, projected at full size where they come as maps, and ReLU."""

    def forward(self, x, gamma, beta, update_stats: bool = True) -> Tensor:
        if isinstance(gamma, dict):
            maps, projections = gamma, beta
            side = x.shape[2]
            if side not in maps:
                maps[side] = F.interpolate(maps[min(maps)], x.shape[2:])
            gamma, beta = (F.conv2d(maps[side], *projection) for projection in projections)
        tracked = update_stats or not self.training
        statistics = (self.running_mean, self.running_var) if tracked else (None, None)
        x = F.batch_norm(x, *statistics, None, None, self.training, self.momentum, self.eps)
        return F.relu(x * (1 + gamma) + beta)


class PlainUpBlock(UpBlock):
    def forward(self, x, first, second, update_stats: bool = True) -> Tensor:
        h = upsample(self.norm1(x, *first(x), update_stats), self.conv1.up)
        h = F.conv2d(h, self.conv1.weight, self.conv1.bias, padding=1)
        h = self.conv2(self.norm2(h, *second(h), update_stats))
        return h + self.skip(upsample(x, self.conv1.up))


class PlainSpectral(Spectral):
    def normalised(self) -> Tensor:
        w = self.weight.flatten(1)
        with torch.no_grad():
            v = unit(self.u @ w)
            u = unit(w @ v)
            if self.training:
                self.u.copy_(u)
        return self.weight / (u @ (w @ v) + EPS)


class PlainSpectralLinear(PlainSpectral, SpectralLinear):  # type: ignore[misc]
    pass


class PlainSpectralConv2d(PlainSpectral, SpectralConv2d):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel(), self.bias, padding=self.padding)
        return F.avg_pool2d(y, 2) if self.down else y


class PlainFirstDownBlock(FirstDownBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + F.avg_pool2d(self.skip(x), 2)


class PlainDownBlock(DownBlock):
    def forward(self, x: Tensor) -> Tensor:
        h, skip = self.conv2(F.relu(self.conv1(F.relu(x)))), self.skip(x)
        return h + (F.avg_pool2d(skip, 2) if self.down else skip)


PLAIN = {
    AttentionalModulation: PlainAttention,
    ModulatedNorm: PlainNorm,
    UpBlock: PlainUpBlock,
    SpectralConv2d: PlainSpectralConv2d,
    SpectralLinear: PlainSpectralLinear,
    FirstDownBlock: PlainFirstDownBlock,
    DownBlock: PlainDownBlock,
}


def nce(a: Tensor, b: Tensor, *, group: None = None) -> Tensor:
    return both_ways(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1)


def region_word_loss(
    regions: Tensor, words: Tensor, lengths: Tensor, *, group: None = None
) -> Tensor:
    return both_ways(50 * region_word_scores(regions, words.to(regions.dtype), lengths))


def both_ways(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.T.float(), target)

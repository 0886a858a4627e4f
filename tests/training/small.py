"""XMC-GAN small enough for tests; as a script, it trains in a process that can be killed."""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from fastxm.encoders.bert import TextBatch
from fastxm.models.xmcgan import XMCGANConfig
from fastxm.training import xmcgan
from fastxm.training.trainer import LoopConfig, train

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]


class Letters(nn.Module):
    """A text encoder without weights: sines of character codes, 6 wide, at most 5 words."""

    name, width, max_length = "letters", 6, 5

    def forward(self, captions: list[str]) -> TextBatch:
        words = torch.zeros(len(captions), self.max_length, self.width)
        lengths = torch.zeros(len(captions), dtype=torch.int64)
        for i, caption in enumerate(captions):
            found = caption.split()[: self.max_length]
            lengths[i] = len(found)
            for j, word in enumerate(found):
                code = float(sum(map(ord, word)))
                words[i, j] = torch.sin(code * torch.arange(1, 1 + self.width))
        return TextBatch(words, words.sum(1) / lengths[:, None], lengths)


def pictures(folder: Path) -> Path:
    """A data set of sixteen plain pictures with captions beside them."""
    folder.mkdir()
    for i in range(16):
        colour = COLOURS[i % 8]
        size = (70, 64) if i < 8 else (64, 80)
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} picture {i}\n{colour} number {i}\n")
    return folder


def recipe(data: Path, **fields: Any) -> xmcgan.XMCGANRecipe:
    """A recipe that reads `data`, 64 px, 2 base channels; its text encoder stands in the fixture
    `folder`."""
    model = XMCGANConfig(image_size=64, gf=2, df=2, z_dim=4, cond_dim=4, text_width=6, words=5)
    plain = {"batch_size": 4, "precision": "fp32", "pretrained_weight": 0.0, "samples": 3}
    made = xmcgan.XMCGANTraining(model=model, data=str(data), device="cpu", **(plain | fields))
    return xmcgan.XMCGANRecipe(made)


if __name__ == "__main__":
    xmcgan.text_encoder = lambda *_, **__: Letters()
    loop = LoopConfig(steps=int(sys.argv[3]), log_every=2, sample_every=4, checkpoint_every=3)
    train(recipe(Path(sys.argv[1]), augment="color"), Path(sys.argv[2]), loop, resume=True)

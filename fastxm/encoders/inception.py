"""Inception-v3 (Szegedy et al. 2016), frozen, from a local file of torchvision's weights.

Names are torchvision's, so that its state dict fits as it is; the auxiliary head is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.frozen import FrozenImages


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Shape = tuple[Any, int, Any]  # kernel, stride, padding
ROW: Shape = ((1, 7), 1, (0, 3))
COLUMN: Shape = ((7, 1), 1, (3, 0))
ONE: Shape = (1, 1, 0)
SAME: Shape = (3, 1, 1)
HALF: Shape = (3, 2, 0)
FIVE: Shape = (5, 1, 2)
Steps = Sequence[tuple[str, int, Shape]]  # name, channels


class Mixed(nn.Module):
    """Branches side by side; a pooled one is last.

    Args:
        c_in: channels.
        branches: the convolutions of each, one after another. Two of one name but for a last
            letter both take what came before them.
        pool: channels of a convolution after average pooling; 0 pools by the maximum, halving.
    """

    def __init__(self, c_in: int, branches: Sequence[Steps], pool: int) -> None:
        super().__init__()
        self.branches = [[name for name, *_ in steps] for steps in branches]
        self.pooled = pool > 0
        for steps in branches:
            inputs = c_in
            for name, channels, shape in steps:
                self.add_module(name, Conv(inputs, channels, *shape))
                inputs = inputs if name.endswith("a") else channels
        if pool:
            self.branch_pool = Conv(c_in, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names in self.branches:
            y = x
            for name in names:
                step = self.get_submodule(name)
                if name.endswith("a"):
                    found.append(step(y))
                else:
                    y = step(y)
            found.append(y)
        if self.pooled:
            return torch.cat([*found, self.branch_pool(F.avg_pool2d(x, 3, 1, 1))], 1)
        return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)


def chain(name: str, *steps: tuple[int, Shape]) -> list[tuple[str, int, Shape]]:
    return [(f"{name}_{i}", channels, shape) for i, (channels, shape) in enumerate(steps, 1)]


def mixed_a(c_in: int, pool: int) -> Mixed:
    five = chain("branch5x5", (48, ONE), (64, FIVE))
    double = chain("branch3x3dbl", (64, ONE), (96, SAME), (96, SAME))
    return Mixed(c_in, [[("branch1x1", 64, ONE)], five, double], pool)


def mixed_b(c_in: int) -> Mixed:
    double = chain("branch3x3dbl", (64, ONE), (96, SAME), (96, HALF))
    return Mixed(c_in, [[("branch3x3", 384, HALF)], double], 0)


def mixed_c(c: int) -> Mixed:
    seven = chain("branch7x7", (c, ONE), (c, ROW), (192, COLUMN))
    double = chain("branch7x7dbl", (c, ONE), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW))
    return Mixed(768, [[("branch1x1", 192, ONE)], seven, double], 192)


def mixed_d(c_in: int) -> Mixed:
    three = chain("branch3x3", (192, ONE), (320, HALF))
    seven = chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, HALF))
    return Mixed(c_in, [three, seven], 0)


def mixed_e(c_in: int) -> Mixed:
    wide: Shape = ((1, 3), 1, (0, 1))
    tall: Shape = ((3, 1), 1, (1, 0))
    three = [("branch3x3_1", 384, ONE)]
    three += [("branch3x3_2a", 384, wide), ("branch3x3_2b", 384, tall)]
    double = chain("branch3x3dbl", (448, ONE), (384, SAME))
    double += [("branch3x3dbl_3a", 384, wide), ("branch3x3dbl_3b", 384, tall)]
    return Mixed(c_in, [[("branch1x1", 320, ONE)], three, double], 192)


class InceptionV3(FrozenImages):
    """Feature maps, pooled features and ImageNet logits of pictures, differentiable to them.

    Args:
        state: torchvision's state dict.
        image_size: side that pictures are resized to, bilinear; None takes them as they are.

    Raises:
        ValueError: the state dict is of another network.
    """

    width = 2048
    channels = (768, 2048)

    def __init__(self, state: dict[str, Tensor], *, image_size: int | None = 299) -> None:
        super().__init__()
        self.image_size = image_size
        with torch.device("meta"):
            self.make()
        ours = {k: v for k, v in state.items() if not k.startswith("AuxLogits")}
        try:
            self.load_state_dict(ours, assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise ValueError(f"these are not weights of Inception-v3: {first}") from error
        self.freeze()
        self.name = f"inception-v3-{image_size or 'any'}-{self.fingerprint()}"

    def make(self) -> None:
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            mixed_a(c, pool) for c, pool in ((192, 32), (256, 64), (288, 64))
        )
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b, self.Mixed_6c = mixed_c(128), mixed_c(160)
        self.Mixed_6d, self.Mixed_6e = mixed_c(160), mixed_c(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = mixed_d(768), mixed_e(1280), mixed_e(2048)
        self.fc = nn.Linear(2048, 1000)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps [B, 768, h, w] and [B, 2048, h', w'] of images [B, 3, H, W] in [0, 1]."""
        x = 2 * self.resized(images) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return [x, self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))]

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """[B, 2048], from what `features` returned."""
        return features[-1].mean((2, 3))

    def classes(self, pooled: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of pooled features [B, 2048]."""
        return self.fc(pooled)

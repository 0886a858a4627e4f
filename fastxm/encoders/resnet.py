"""ResNet-50 (He et al. 2016), frozen, from a local file of torchvision's weights.

Names are torchvision's, so that its state dict fits as it is. Bottlenecks stride in their 3 x 3
convolution.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.frozen import FrozenImages, keep_spread, standard

STAGES = [(64, 3), (128, 4), (256, 6), (512, 3)]  # width, blocks
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class Bottleneck(nn.Module):
    """Project, convolve, expand fourfold, and add the input."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(FrozenImages):
    """Pooled features [B, 2048] of pictures, and maps, differentiable to them.

    Args:
        weights: torchvision's state dict.
        image_size: side that pictures are resized to, bilinear with antialiasing; None takes
            them as they are.

    Raises:
        ValueError: the weights are of another network.
    """

    width = 2048

    def __init__(self, weights: dict[str, Tensor], *, image_size: int | None = 224) -> None:
        super().__init__()
        self.image_size = image_size
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            inputs = [64, *(4 * width for width, _ in STAGES)]
            for i, ((width, count), (first, after)) in enumerate(zip(STAGES, pairwise(inputs))):
                stride = 1 if i == 0 else 2
                blocks = [Bottleneck(first, width, stride)]
                blocks += [Bottleneck(after, width, 1) for _ in range(count - 1)]
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(2048, 1000)
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError("these are not weights of a ResNet-50") from error
        keep_spread(self, MEAN, STD)
        self.freeze()
        self.name = f"resnet50-{image_size or 'any'}-{self.fingerprint()}"

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of images [B, 3, H, W] in [0, 1], of strides 4, 8, 16 and 32."""
        images = self.resized(images)
        x = F.relu(self.bn1(self.conv1(standard(self, images))))
        maps = [F.max_pool2d(x, 3, 2, 1)]
        for i in range(len(STAGES)):
            maps.append(getattr(self, f"layer{i + 1}")(maps[-1]))
        return maps[1:]

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """[B, 2048], from what `features` returned."""
        return features[-1].mean((2, 3))

    def classes(self, pooled: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of pooled features [B, 2048]."""
        return self.fc(pooled)

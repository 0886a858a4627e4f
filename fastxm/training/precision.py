"""Where and how arithmetic is done: device, autocast, loss scaling, seeds."""

import os
import random
import re
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch
from torch.utils import deterministic

from fastxm.ops.gemm import LEVEL
from fastxm.training.ranks import launched, number

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one.

    Of several processes on a machine each takes the GPU of its number.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"device is auto, cpu or cuda, not {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError("device is cuda, but this machine or this torch has no CUDA device")
    if launched() > 1:
        if name != "cuda":
            raise ValueError(f"each of {launched()} processes takes its own GPU: no device {name}")
        name = f"cuda:{number('LOCAL_RANK')}"
    device = torch.device(name)
    if (device.index or 0) >= count:
        raise ValueError(f"device is cuda:0 to cuda:{count - 1}, not {name}")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16; emulated it takes ten times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return LEVEL == "bfloat16"


def pick_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision that a training on the device has; "auto" is bf16 where there is, else fp32.

    Raises:
        ValueError: it is bf16, and the GPU has none.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16: use --precision fp16")
    return precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Convolutions and matrix products in the given precision; float32 leaves all as it is."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds every global random generator; a GPU keeps to algorithms that repeat.

    Where PyTorch has none, it warns: the gradient of an antialiased resize, which all take that
    look at drawn pictures by a frozen network (XMC-GAN's pretrained loss, MirrorGAN's DAMSM and
    STREAM, LAFITE's encoder and projected discriminator), and the cumulative sum of vMF's draws.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats with it alone
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002

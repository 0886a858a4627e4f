"""Modules with parameters, built on the ops and shared by the models."""

from fastxm.nn.blocks import DownBlock, FirstDownBlock, UpBlock
from fastxm.nn.modulation import (
    AttentionalModulation,
    ConditionalModulation,
    ModulatedNorm,
    synchronise,
    take_statistics,
)
from fastxm.nn.spectral import SpectralConv2d, SpectralLinear, normalised_once

__all__ = [
    "AttentionalModulation",
    "ConditionalModulation",
    "DownBlock",
    "FirstDownBlock",
    "ModulatedNorm",
    "SpectralConv2d",
    "SpectralLinear",
    "UpBlock",
    "normalised_once",
    "synchronise",
    "take_statistics",
]

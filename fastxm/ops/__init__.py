"""The four rooms: fused operations with a plain formula behind each."""

from fastxm.ops.dispatch import backend
from fastxm.ops.modulation import modulation
from fastxm.ops.word_modulation import word_attention, word_modulation

__all__ = ["backend", "modulation", "word_attention", "word_modulation"]

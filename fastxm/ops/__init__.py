"""The four rooms: fused operations with a plain formula behind each."""

from fastxm.ops.dispatch import backend
from fastxm.ops.info_nce import info_nce
from fastxm.ops.mmd import mmd2
from fastxm.ops.modulation import modulation, word_modulation
from fastxm.ops.region_word import region_word_scores

__all__ = ["backend", "info_nce", "mmd2", "modulation", "region_word_scores", "word_modulation"]

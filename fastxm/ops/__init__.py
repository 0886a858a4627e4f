"""The four rooms: fused operations with a plain formula behind each."""

try:
    from fastxm import _C as _C
except ImportError as error:
    raise ImportError(
        "fastxm._C is not here: install fastxm (pip install .), and start Python outside of its "
        "source folder unless it was installed with -e"
    ) from error

from fastxm.ops.dispatch import backend
from fastxm.ops.info_nce import info_nce
from fastxm.ops.mmd import mmd2
from fastxm.ops.mmd_median import median_heuristic
from fastxm.ops.mmd_two_sample import mmd_permutation_test
from fastxm.ops.mmd_variance import mmd2_and_variance
from fastxm.ops.modulation import modulation
from fastxm.ops.region_word import region_word_scores
from fastxm.ops.word_modulation import word_attention, word_modulation

__all__ = [
    "backend",
    "info_nce",
    "median_heuristic",
    "mmd2",
    "mmd2_and_variance",
    "mmd_permutation_test",
    "modulation",
    "region_word_scores",
    "word_attention",
    "word_modulation",
]

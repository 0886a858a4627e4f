"""Region-word scores as one op of PyTorch: which backend runs, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import region_word_blocks as blocks
from fastxm.ops import region_word_products as products
from fastxm.ops import region_word_reference as reference
from fastxm.ops import region_word_tiles as tiles
from fastxm.ops import region_word_triton as triton
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.dispatch import no_autocast

BACKENDS = {"reference": reference, "cpu": blocks, "cuda": blocks, "triton": triton}


def backend(regions: Tensor, words: Tensor) -> Any:
    """C++ on a CPU: in tiles, or where there are none in blocks. On a GPU Triton, which skips
    padding and makes its own products; of float64, which it does not take, or without it the CUDA
    blocks; else the formula."""
    device, float64 = words.device, dispatch.wide_dtype(regions, words) == torch.float64
    offered = [name for name in BACKENDS if not (name == "triton" and float64)]
    auto = "cpu" if device.type == "cpu" else "reference"
    if device.type == "cuda":
        first = [name for name in ("triton", "cuda") if name in offered]
        auto = next((name for name in first if not dispatch.missing(name)), "reference")
    name = dispatch.choose("region_word", device, auto, offered)
    tiled = name == "cpu" and products.tile_dtype(regions, words) is not None
    return tiles if tiled else BACKENDS[name]


def _scores(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    sharp: float,
    pool: float,
    word_softmax: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    dtype = dispatch.wide_dtype(regions, words)
    kept = words.new_empty(products.kept_shape(regions, words, keep), dtype=dtype)
    with no_autocast(words):  # regions may stay in half precision
        args = (regions, words, lengths, kept, sharp, pool, word_softmax)
        return backend(regions, words).fwd(*args), kept


def _gradients(
    dscores: Tensor,
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    kept: Tensor,
    sharp: float,
    pool: float,
    word_softmax: bool,
    of_words: bool,
) -> tuple[Tensor, Tensor]:
    options = (sharp, pool, word_softmax)
    with no_autocast(words):
        given = (dscores, regions, words, lengths, kept, *options)
        return backend(regions, words).bwd(*given, of_words=of_words)


scores_of = torch.library.custom_op("fastxm::region_word_fwd", _scores, mutates_args=())
gradients_of = torch.library.custom_op("fastxm::region_word_bwd", _gradients, mutates_args=())
gradients = gradient(gradients_of, _gradients, reference.differentiable_bwd)


@scores_of.register_fake
def _(regions, words, lengths, sharp, pool, word_softmax, keep):
    dtype = dispatch.wide_dtype(regions, words)
    shapes = ((words.shape[0], regions.shape[0]), products.kept_shape(regions, words, keep))
    return tuple(words.new_empty(shape, dtype=dtype) for shape in shapes)


@gradients_of.register_fake
def _(dscores, regions, words, lengths, kept, sharp, pool, word_softmax, of_words):
    dwords = torch.empty_like(words) if of_words else words.new_empty(0)
    return torch.empty_like(regions), dwords


def _save(ctx, inputs, output):
    regions, words, lengths, *ctx.options, _ = inputs
    ctx.save_for_backward(regions, words, lengths, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of what is kept, which is large


def _backward(ctx, dscores, _):
    if dscores is None:
        return (None,) * len(ctx.needs_input_grad)
    regions, words, lengths, kept = ctx.saved_tensors
    of_words = ctx.needs_input_grad[1]
    given = (dscores, regions, words, lengths, kept, *ctx.options, of_words)
    dregions, dwords = gradients(*given)
    return dregions, dwords if of_words else None, None, None, None, None, None


scores = differentiable(scores_of, _scores, _save, _backward, reference.scores)

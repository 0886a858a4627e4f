"""Modulation: normalise, scale and shift by maps of lower resolution, and rectify.

    y[b, c, p] = act(z),    z = (1 + gamma[b, c, q]) xhat + beta[b, c, q],    xhat = (x - mean) rstd

q is the cell of gamma's h x w grid that holds pixel p of the H x W image: k x k pixels a cell,
k = H / h = W / w. With g = dy act'(z), the backward needs two sums a cell, and from them two
numbers a statistic of n values:

    dbeta = sum_cell g        dgamma = sum_cell g xhat
    dx = rstd ((1 + gamma) g - m1 - xhat m2),
    m1 = 1/n sum (1 + gamma) dbeta,    m2 = 1/n sum (1 + gamma) dgamma;    0 where mean is given
"""

from typing import Any

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import modulation_passes as passes
from fastxm.ops import modulation_reference as reference
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.modulation_checks import AXES, check, check_running


def modulation(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    norm: str = "batch",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """act(norm(x) (1 + gamma) + beta), gamma and beta read as nearest-upsampled to x.

    Args:
        x: [B, C, H, W], NCHW or channels_last (each read in its own order), any floating dtype.
        gamma, beta: [B, C, h, w] with H = k h and W = k w; h = w = 1 is conditional batch norm.
        norm: "batch" (over B, H, W), "instance" (H, W), "layer" (C, H, W) or "none".
        running_mean, running_var: [C], for norm="batch" alone: moved by `momentum` towards the
            batch's in training, used instead of them otherwise. The variance kept is the biased
            one, as in TensorFlow and JAX (torch.nn.BatchNorm2d keeps n / (n - 1) of it).
        training: False takes running_mean and running_var, as constants.
        activation: "relu" or "none".
        group: a torch.distributed group whose ranks give one or more rows each: the batch of
            norm="batch" is that of all. All ranks run the backward, or none.

    Returns:
        [B, C, H, W] in x's dtype and memory format. Statistics and sums are float32 (float64 for
        float64); dgamma and dbeta come in the dtypes of gamma and beta.

    Raises:
        ValueError: shapes that do not fit, an unknown norm or activation, no running statistics.
        TypeError: tensors that are not floating, or of several devices.
    """
    check(x, gamma, beta, norm, activation)
    check_running(x, running_mean, running_var)
    axes, mean, var = AXES[norm], None, None
    if norm == "none":
        mean, var, eps = x.new_zeros((1, 1, 1, 1)), x.new_ones((1, 1, 1, 1)), 0.0
    elif norm == "batch" and not training:
        if running_mean is None or running_var is None:
            raise ValueError("modulation with training=False needs running_mean and running_var")
        axes, mean, var = [], running_mean.view(1, -1, 1, 1), running_var.view(1, -1, 1, 1)
    ranks = group.group_name if group is not None and axes == AXES["batch"] else ""
    out, mean, var = _modulation(x, gamma, beta, mean, var, axes, eps, activation == "relu", ranks)
    # the statistics of no rows are NaN, and none of running ones
    moved = axes == AXES["batch"] and (x.numel() > 0 or ranks != "")
    if moved and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
            running_var.lerp_(var.flatten().to(running_var.dtype), momentum)
    return out


def _backend(x: Tensor) -> Any:
    """C++ but for float16; CUDA where it was built, else Triton; else the formula."""
    auto = {"cpu": "cpu", "cuda": "triton" if dispatch.missing("cuda") else "cuda"}
    plain = x.numel() == 0 or (x.device.type == "cpu" and x.dtype == torch.float16)
    usual = "reference" if plain else auto.get(x.device.type, "reference")
    name = dispatch.choose("modulation", x.device, usual)
    return reference if name == "reference" else passes.Fused(name)


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None,
    axes: list[int], eps: float, relu: bool, group: str = ""
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if mean is not None and var is not None:  # an output is no view of an input
        mean, var = (t.to(x.device, dispatch.wide_dtype(x), copy=True) for t in (mean, var))
    return _backend(x).fwd(x, gamma, beta, mean, var, axes, eps, relu, group)


_fwd = torch.library.custom_op("fastxm::modulation_fwd", _forward, mutates_args=())


@_fwd.register_fake
def _(x, gamma, beta, mean, var, axes, eps, relu, group=""):
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)] if axes else mean.shape
    mean, var = (x.new_empty(shape, dtype=dispatch.wide_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=reference.layout(x)), mean, var


def _gradients(
    dout: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor,
    axes: list[int], eps: float, relu: bool, group: str = ""
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backend(x).bwd(dout, x, gamma, beta, mean, var, axes, eps, relu, group)


_bwd = torch.library.custom_op("fastxm::modulation_bwd", _gradients, mutates_args=())
gradients = gradient(_bwd, _gradients, reference.differentiable_bwd)


@_bwd.register_fake
def _(dout, x, gamma, beta, mean, var, axes, eps, relu, group=""):
    return tuple(torch.empty_like(t, memory_format=reference.layout(x)) for t in (x, gamma, beta))


def _save(ctx, inputs, output):
    x, gamma, beta, _, _, *ctx.options = inputs
    ctx.save_for_backward(x, gamma, beta, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, *_):
    return *gradients(dout, *ctx.saved_tensors, *ctx.options), *[None] * 6


_modulation = differentiable(_fwd, _forward, _save, _backward, reference.fwd)

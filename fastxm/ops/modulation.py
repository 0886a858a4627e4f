"""Modulation: normalise, scale and shift by maps of lower resolution, and rectify, in one pass.

    y[b, c, p] = act(z),    z = (1 + gamma[b, c, q]) xhat + beta[b, c, q],    xhat = (x - mean) rstd

q is the cell of gamma's h x w grid that holds pixel p of the H x W image: k x k pixels a cell,
k = H / h = W / w. With g = dy act'(z), the backward needs two sums a cell, and from them two
numbers a statistic of n values:

    dbeta = sum_cell g        dgamma = sum_cell g xhat
    dx = rstd ((1 + gamma) g - m1 - xhat m2),
    m1 = 1/n sum (1 + gamma) dbeta,    m2 = 1/n sum (1 + gamma) dgamma;    0 where mean is given
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch

AXES = {"batch": [0, 2, 3], "instance": [2, 3], "layer": [1, 2, 3], "none": []}


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
) -> Tensor:
    """act(norm(x) (1 + gamma) + beta), gamma and beta read as nearest-upsampled to x.

    Args:
        x: [B, C, H, W], NCHW or channels_last (each read in its own order), any floating dtype.
        gamma, beta: [B, C, h, w] with H = k h and W = k w; h = w = 1 is conditional batch norm.
        norm: "batch" (over B, H, W), "instance" (H, W), "layer" (C, H, W) or "none".
        running_mean, running_var: [C], for norm="batch" alone: moved by `momentum` towards the
            batch's in training, used instead of them otherwise. The variance kept is the biased
            one, as in the TensorFlow and JAX models (torch.nn.BatchNorm2d keeps n / (n - 1) of it).
        training: False takes running_mean and running_var, as constants.
        activation: "relu" or "none".

    Returns:
        [B, C, H, W] in x's dtype and memory format. Statistics and sums are float32 (float64 for
        float64); dgamma and dbeta come in the dtypes of gamma and beta.

    Raises:
        ValueError: a shape, norm or activation that is none of these.
    """
    _check(x, gamma, beta, norm, activation)
    given = norm == "batch" and not training
    if given and (running_mean is None or running_var is None):
        raise ValueError("modulation with training=False needs running_mean and running_var")
    axes = [] if given else AXES[norm]
    mean, var = (running_mean, running_var) if given else (None, None)
    out, mean, var = _fwd(
        x, gamma, beta, mean, var, axes, eps if axes or given else 0.0, activation
    )
    if norm == "batch" and training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
            running_var.lerp_(var.flatten().to(running_var.dtype), momentum)
    return out


def _check(x: Tensor, gamma: Tensor, beta: Tensor, norm: str, activation: str) -> None:
    if norm not in AXES or activation not in ("relu", "none"):
        raise ValueError(f"norm is one of {', '.join(AXES)} and activation relu or none, "
                         f"not {norm!r} and {activation!r}")  # fmt: skip
    if (
        x.ndim != 4
        or gamma.ndim != 4
        or gamma.shape != beta.shape
        or gamma.shape[:2] != x.shape[:2]
    ):
        raise ValueError("modulation needs x [B, C, H, W], gamma and beta [B, C, h, w], not "
                         f"{list(x.shape)}, {list(gamma.shape)} and {list(beta.shape)}")  # fmt: skip
    (H, W), (h, w) = x.shape[2:], gamma.shape[2:]
    if h < 1 or w < 1 or H % h or H // h * w != W:
        raise ValueError(
            f"x [{H}, {W}] is no whole multiple of gamma [{h}, {w}] in both directions"
        )


def _cells(x: Tensor, gamma: Tensor) -> Tensor:
    h, w = gamma.shape[2:]
    return x.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # [B, C, h, k, w, k]


def _formula(x, gamma, beta, mean, var, axes: list[int], eps: float, activation: str):
    wide, gamma, beta = dispatch.wide(x, gamma, beta)
    if axes:
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    elif mean is None:
        mean, var = wide.new_zeros(1, 1, 1, 1), wide.new_ones(1, 1, 1, 1)
    else:
        mean, var = mean.to(wide).view(1, -1, 1, 1), var.to(wide).view(1, -1, 1, 1)
    xhat = (wide - mean) * torch.rsqrt(var + eps)
    gamma, beta = gamma[:, :, :, None, :, None], beta[:, :, :, None, :, None]
    z = (_cells(xhat, gamma[:, :, :, 0, :, 0]) * (1 + gamma) + beta).reshape(x.shape)
    out = torch.relu(z) if activation == "relu" else z
    return out.to(x.dtype).contiguous(memory_format=_format(x)), mean, var


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op("fastxm::modulation_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    axes: list[int],
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, var = _formula(x, gamma, beta, mean, var, axes, eps, activation)
    return out, mean.clone(), var.clone()


@_fwd.register_fake
def _(x, gamma, beta, mean, var, axes, eps, activation):
    (wide,) = dispatch.wide(x.new_empty(0))
    if axes:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    else:
        shape = [1, 1 if mean is None else x.shape[1], 1, 1]
    out = torch.empty_like(x, memory_format=_format(x))
    return out, wide.new_empty(shape), wide.new_empty(shape)


@torch.library.custom_op("fastxm::modulation_bwd", mutates_args=())
def _bwd(
    dout: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    axes: list[int],
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _formula_bwd(dout, x, gamma, beta, mean, var, axes, eps, activation)


def _formula_bwd(dout, x, gamma, beta, mean, var, axes, eps, activation):
    g, wide, scale, shift = dispatch.wide(dout, x, gamma, beta)
    scale = 1 + scale[:, :, :, None, :, None]
    rstd = torch.rsqrt(var + eps)
    xhat = (wide - mean) * rstd
    g, cells = _cells(g, gamma), _cells(xhat, gamma)
    if activation == "relu":
        g = g * (cells * scale + shift[:, :, :, None, :, None] > 0)
    dbeta, dgamma = g.sum((3, 5)), (g * cells).sum((3, 5))
    dx = (g * scale).reshape(x.shape)
    if axes:
        dx = dx - dx.mean(axes, keepdim=True) - xhat * (dx * xhat).mean(axes, keepdim=True)
    return tuple(
        t.to(like.dtype).contiguous(memory_format=_format(x))
        for t, like in ((dx * rstd, x), (dgamma, gamma), (dbeta, beta))
    )


@_bwd.register_fake
def _(dout, x, gamma, beta, mean, var, axes, eps, activation):
    return tuple(torch.empty_like(t, memory_format=_format(x)) for t in (x, gamma, beta))


def _save(ctx, inputs, output):
    x, gamma, beta, ctx.mean, ctx.var, *ctx.options = inputs
    ctx.save_for_backward(x, gamma, beta, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, dmean, dvar):
    x, gamma, beta, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():

        def formula(x, gamma, beta):
            return _formula(x, gamma, beta, ctx.mean, ctx.var, *ctx.options)[0]

        grads = dispatch.vjp(formula, (x, gamma, beta), (dout,))
    else:
        grads = _bwd(dout, x, gamma, beta, mean, var, *ctx.options)
    return *grads, *[None] * 5


_fwd.register_autograd(_backward, setup_context=_save)

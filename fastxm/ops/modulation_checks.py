"""What modulation takes."""

from torch import Tensor

from fastxm.ops import dispatch

AXES = {"batch": [0, 2, 3], "instance": [2, 3], "layer": [1, 2, 3], "none": []}


def check(x: Tensor, gamma: Tensor, beta: Tensor, norm: str, activation: str) -> None:
    if norm not in AXES or activation not in ("none", "relu"):
        raise ValueError(f"norm is one of {', '.join(AXES)} and activation relu or none, "
                         f"not {norm!r} and {activation!r}")  # fmt: skip
    dispatch.one_device("modulation", x, gamma, beta)
    if not all(t.is_floating_point() for t in (x, gamma, beta)):
        raise TypeError("modulation needs floating tensors, not "
                        f"{[t.dtype for t in (x, gamma, beta)]}")  # fmt: skip
    fits = x.ndim == gamma.ndim == 4 and gamma.shape == beta.shape and x.shape[:2] == beta.shape[:2]
    if fits:
        (H, W), (h, w) = x.shape[2:], gamma.shape[2:]
        fits = 0 < h <= H and H % h == 0 and H // h * w == W
    if not fits:
        raise ValueError("modulation needs x [B, C, k h, k w], gamma and beta [B, C, h, w], not "
                         f"{list(x.shape)}, {list(gamma.shape)}, {list(beta.shape)}")  # fmt: skip


def check_running(x: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    for t in (mean, var) if mean is not None or var is not None else ():
        if t is None or t.shape != x.shape[1:2]:
            raise ValueError(f"modulation needs running_mean and running_var [{x.shape[1]}] or "
                             f"neither, not {None if t is None else [*t.shape]}")  # fmt: skip

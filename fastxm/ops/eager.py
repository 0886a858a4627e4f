"""An op of PyTorch without its registration, where nothing traces it: a registered op with a
backward takes some 0.15 ms to call, longer than the work on a hundred rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def eager(
    op: Callable[..., Any],
    work: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What calls op, or what op does: work forward, then save and backward as it registered them.

    The first argument of all is a tensor, by which the choice is made.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = work(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return backward(ctx, *cotangents)

    def call(x: Tensor, *inputs: Any) -> Any:
        return (Eager.apply if runs_at_once(x) else op)(x, *inputs)

    return call


def runs_at_once(x: Tensor) -> bool:
    """Whether ops on x run as they are called: no torch.compile, functorch transform or mode."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
        and not torch._C._len_torch_dispatch_stack()
    )

"""Ops and autograd: what a registered op costs to call, second derivatives, autocast."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable(
    op: Any, work: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers the backward of an op, and returns what calls the op or, where nothing traces it,
    what it does: a registered op with a backward takes some 0.15 ms to call, longer than the work
    on a hundred rows.

    The first argument of all is a tensor, by which the choice is made.

    Args:
        op: of torch.library.custom_op.
        work: what it does.
        save, backward: as its register_autograd takes them.
    """
    op.register_autograd(backward, setup_context=save)

    class AtOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = work(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return backward(ctx, *cotangents)

    def call(x: Tensor, *inputs: Any) -> Any:
        return (AtOnce.apply if runs_at_once(x) else op)(x, *inputs)

    return call


def at_once(op: Callable[..., Any], work: Callable[..., Any]) -> Callable[..., Any]:
    """What calls an op without a backward, or what it does; chosen as in `differentiable`."""
    return lambda x, *inputs: (work if runs_at_once(x) else op)(x, *inputs)


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


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for x's device."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def vjp(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of a formula by autograd, themselves differentiable: the second-order path.

    Args:
        formula: the op in plain PyTorch, called with `inputs`.
        inputs: tensors, or None where an optional one is left out.
        cotangents: one for each output of the formula; None for an output that is not used.

    Returns:
        one gradient for each input; None where it needs none.
    """
    with torch.enable_grad(), no_autocast(next(x for x in inputs if x is not None)):
        inputs = [x if x is None else x.view_as(x) for x in inputs]  # two may be one tensor
        outputs = formula(*inputs)
        outs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, c) for o, c in zip(outs, cotangents) if c is not None and o.requires_grad]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        if not pairs or not wanted:
            return [None for _ in inputs]
        outs, cots = zip(*pairs)
        found = iter(torch.autograd.grad(outs, wanted, cots, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]

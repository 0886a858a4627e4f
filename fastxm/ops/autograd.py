"""Ops and autograd: the cost of a registered op, torch.func, forward mode, second derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxm.ops.vjp import vjp


def differentiable(
    op: Any,
    work: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    formula: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers the backward of an op, and returns what calls the op by the way that fits:

        where torch.compile, export or another mode traces     the op
        in forward mode (forward_ad, torch.func.jvp)           the formula
        in torch.func.grad, vmap and the like                  the work, problem by problem in vmap
        else                                                   the work

    A registered op with a backward takes some 0.15 ms to call, longer than the work on a hundred
    rows; torch.func cannot take gradients of one, and loses the tangents of its inputs.

    The first argument of all is a tensor, by which the choice is made.

    Args:
        op: of torch.library.custom_op; None where the work is plain PyTorch, which modes see into.
        work: what it does.
        save, backward: as its register_autograd takes them.
        formula: the work in plain PyTorch.
    """
    if op is not None:
        op.register_autograd(backward, setup_context=save)

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = work(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return backward(ctx, *cotangents)

    class Transformed(Work):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return call(*inputs)

        setup_context = staticmethod(save)

        @staticmethod
        def vmap(info: Any, dims: Sequence[Any], *inputs: Any) -> Any:
            def one(i: int) -> Any:
                return call(*(x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                              for x, dim in zip(inputs, dims)))  # fmt: skip

            each = [*zip(*(one(i) for i in range(info.batch_size)))]
            outputs = [None if of[0] is None else torch.stack(of) for of in each]
            return tuple(outputs), tuple(None if out is None else 0 for out in outputs)

    def call(x: Tensor, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            return formula(x, *inputs)
        if op is not None and torch.compiler.is_compiling():
            return op(x, *inputs)
        if _transformed():
            return Transformed.apply(x, *inputs)
        if op is not None and not _runs_at_once(x):
            return op(x, *inputs)
        return (Work.apply if torch.is_grad_enabled() else work)(x, *inputs)

    return call


def gradient(op: Any, work: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """`differentiable`, for the gradient of another op: its own gradient is that of a formula.

    So a first derivative costs the same whether or not a second one will be asked for.

    Args:
        op, work: as of `differentiable`.
        formula: the same gradients in plain PyTorch, or None in place of those of inputs that
            need none. May start with the other op's formula: see `vjp`.
    """

    def save(ctx, inputs, output):
        tensors = [isinstance(x, Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x, is_tensor in zip(inputs, tensors) if is_tensor))
        ctx.others = [None if is_tensor else x for x, is_tensor in zip(inputs, tensors)]
        ctx.tensors = tensors
        ctx.set_materialize_grads(False)

    def backward(ctx, *cotangents):
        saved = iter(ctx.saved_tensors)
        pairs = zip(ctx.tensors, ctx.others)
        inputs = [next(saved) if is_tensor else other for is_tensor, other in pairs]
        return tuple(vjp(formula, inputs, cotangents, ctx.needs_input_grad))

    return differentiable(op, work, save, backward, lambda *inputs: tuple(formula(*inputs)))


def _transformed() -> bool:
    # in torch.func, but for its functionalize, which takes ops and no autograd.Function
    functorch = torch._C._functorch
    top = (
        functorch.peek_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
    )
    return top is not None and top.key() != functorch.TransformType.Functionalize


def _runs_at_once(x: Tensor) -> bool:
    # plain tensors, and no mode to see the op
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
        and not torch._C._len_torch_dispatch_stack()
    )

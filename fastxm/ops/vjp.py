"""Gradients of a formula in plain PyTorch that can be differentiated again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastxm.ops.dispatch import no_autocast


def vjp(
    formula: Callable[..., Any],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradients of a formula by autograd, themselves differentiable, in torch.func too.

    Args:
        formula: in plain PyTorch, called with `inputs`; gives a tensor or several, or None.
        inputs: tensors and others.
        cotangents: one for each output of the formula; None for an output that is not used.
        needs: of which inputs gradients are wanted; None: of every floating tensor. Whether a
            tensor requires one does not tell, if it was saved in a transform that has ended.

    Returns:
        one gradient for each input; None where it needs none or none comes.
    """
    if needs is None:
        needs = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
    places = [i for i, need in enumerate(needs) if need]
    if not places or all(c is None for c in cotangents):
        return [None for _ in inputs]
    used: list[Tensor] = []  # the cotangents of what is returned below

    def outputs(*wanted: Tensor) -> list[Tensor]:
        given = dict(zip(places, wanted))
        found = formula(*(given.get(i, x) for i, x in enumerate(inputs)))
        each = zip([found] if isinstance(found, Tensor) else found, cotangents)
        some = [(o, c) for o, c in each if o is not None and c is not None]
        used[:] = [c for _, c in some]
        return [o for o, _ in some]

    with torch.enable_grad(), no_autocast(next(x for x in inputs if isinstance(x, Tensor))):
        # views, for two may be one tensor, and one may be of a transform that has ended
        wanted = [inputs[i].view_as(inputs[i]) for i in places]
        if torch._C._are_functorch_transforms_active():
            back = torch.func.vjp(outputs, *wanted)[1]
            grads = back(used)
        else:
            wanted = [x if x.requires_grad else x.detach().requires_grad_() for x in wanted]
            pairs = [(o, c) for o, c in zip(outputs(*wanted), used) if o.requires_grad]
            if not pairs:
                return [None for _ in inputs]
            outs, cots = zip(*pairs)
            grads = torch.autograd.grad(outs, wanted, cots, create_graph=True, allow_unused=True)
    by_place = dict(zip(places, grads))
    return [by_place.get(i) for i in range(len(inputs))]

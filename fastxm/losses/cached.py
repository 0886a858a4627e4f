"""A step over a batch of which the encoders do not hold the activations at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def cached_step(
    encoders: Sequence[Callable[..., Tensor]],
    batches: Sequence[Any],
    loss: Callable[..., Tensor],
    chunk_size: int,
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Tensor:
    """Adds up the gradients of loss(encoder(batch), ..), with activations of one chunk at a time.

    Each chunk is encoded without a graph, the loss gives the gradients of the embeddings, and each
    chunk is encoded again, from the same random state, to take them on to the parameters: the same
    numbers as in one step on the chunks, for one more forward. Layers that mix samples (batch norm)
    see a chunk at a time, and each chunk twice. Random numbers must be PyTorch's, of the CPU or of
    the current CUDA device. Under autocast call it inside. A DistributedDataParallel encoder
    averages its gradients once, with its last chunk; parameters of the loss alone are yours to
    average.

    Args:
        encoders: one a batch, from a chunk to embeddings [rows, D]; one may stand there twice.
        batches: what each encoder is called with: a tensor [B, ..] or a list of B items; a tuple
            or a dict of them for several arguments.
        loss: from as many embeddings [B, D] to a scalar, such as `clip_loss` or one across ranks.
        chunk_size: rows of a chunk.
        backward: what is called with the loss, such as lambda l: scaler.scale(l).backward().

    Returns:
        scalar, the loss, without a graph.

    Raises:
        ValueError: numbers of encoders, batches or rows do not fit. TypeError: a batch of anything
            else.

    Source: Gao et al. 2021 (GradCache), section 3.2.
    """
    if len(encoders) != len(batches) or chunk_size < 1:
        raise ValueError(f"cached_step needs an encoder for each batch and chunks of 1 row or more,"
                         f" not {len(encoders)}, {len(batches)} and {chunk_size}")  # fmt: skip
    chunks = [_chunks(batch, chunk_size) for batch in batches]
    encoded = [_encode(encoder, parts) for encoder, parts in zip(encoders, chunks)]
    # autocast keeps the weights that it cast, here without a graph
    torch.clear_autocast_cache()
    value = loss(*(embeddings for embeddings, _ in encoded))
    backward(value)
    jobs = []
    for encoder, parts, (embeddings, states) in zip(encoders, chunks, encoded):
        gradient = embeddings.grad
        if gradient is not None:
            jobs += [(encoder, *job) for job in zip(parts, states, gradient.split(chunk_size))]
    for i, (encoder, (args, kwargs), state, gradient) in enumerate(jobs):
        again = any(encoder is other for other, *_ in jobs[i + 1 :])
        hold = getattr(encoder, "no_sync", None) if again else None
        with _replayed(state), hold() if hold else contextlib.nullcontext():
            embeddings = encoder(*args, **kwargs)
            if embeddings.requires_grad:
                embeddings.backward(gradient)
    return value.detach()


Chunk = tuple[Sequence[Any], dict[str, Any]]  # arguments and keyword arguments


def _chunks(batch: Any, size: int) -> list[Chunk]:
    kwargs = batch if isinstance(batch, dict) else {}
    args = () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
    parts = [*args, *kwargs.values()]
    if wrong := [type(part).__name__ for part in parts if not isinstance(part, Tensor | list)]:
        raise TypeError(f"a batch is of tensors and lists, not of {', '.join(wrong)}")
    rows = {len(part) for part in parts}
    if len(rows) != 1:
        raise ValueError(f"the parts of a batch have as many rows each, not {sorted(rows)}")
    slices = [slice(i, i + size) for i in range(0, max(1, *rows), size)]
    return [([a[here] for a in args], {k: v[here] for k, v in kwargs.items()}) for here in slices]


def _encode(encoder: Callable[..., Tensor], chunks: Sequence[Chunk]) -> tuple[Tensor, list[Any]]:
    """Embeddings [B, D], a leaf, and the random state before each chunk."""
    states, embeddings = [], []
    with torch.no_grad():
        for args, kwargs in chunks:
            states.append(_random_state())
            embeddings.append(encoder(*args, **kwargs))
    return torch.cat(embeddings).requires_grad_(), states


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


@contextlib.contextmanager
def _replayed(state: Sequence[Tensor]) -> Iterator[None]:
    """Random numbers as from a state on; afterwards as if there had been none."""
    cpu, *cuda = state
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        torch.set_rng_state(cpu)
        for device in cuda:
            torch.cuda.set_rng_state(device)
        yield

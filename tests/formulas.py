"""What several tests hold the ops against: plain PyTorch, written independently of them."""

import math

import torch
import torch.nn.functional as F


def info_nce_formula(x, y, scale, symmetric=True, normalize=False, labels=None,
                     label_smoothing=0.0, offset=0, reduction="mean"):  # fmt: skip
    dtype = torch.promote_types(x.dtype, torch.float32)
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    s = (x @ y.T).to(dtype) * scale
    one_hot = torch.eye(len(y), dtype=dtype, device=x.device)[offset : offset + len(x)]
    other = torch.ones_like(s, dtype=torch.bool)
    if labels is not None:
        other = labels[offset : offset + len(x), None] != labels[None, :]
    candidates = other | one_hot.bool()

    def direction(s, one_hot, candidates):
        share = candidates.to(dtype) / candidates.sum(1, keepdim=True)
        target = (1 - label_smoothing) * one_hot + label_smoothing * share
        log_p = s - s.masked_fill(~candidates, -math.inf).logsumexp(1, keepdim=True)
        return -(target * log_p).sum(1)

    loss = direction(s, one_hot, candidates)
    if symmetric:
        loss = 0.5 * (loss + direction(s.T, one_hot.T, candidates.T))
    return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]


def info_nce_metrics(x, y, scale, symmetric=True, normalize=False, labels=None, **_):
    """Accuracy and entropy, of both directions if symmetric, where M = N."""
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    s = scale * x @ y.T
    if labels is not None:
        same = (labels[:, None] == labels) & ~torch.eye(len(x), dtype=torch.bool)
        s = s.masked_fill(same, -math.inf)
    found = []
    for logits in (s, s.T)[: 1 + symmetric]:
        accuracy = (logits.argmax(1) == torch.arange(len(x))).to(s).mean()
        entropy = torch.special.entr(logits.softmax(1)).sum(1).mean()
        found.append(torch.stack([accuracy, entropy]))
    return sum(found) / len(found)


def modulation_formula(x, gamma, beta, norm="batch", activation="relu"):
    if norm == "batch":
        xhat = F.batch_norm(x, None, None, training=True)
    elif norm == "instance":
        xhat = F.group_norm(x, x.shape[1])
    else:
        xhat = F.group_norm(x, 1) if norm == "layer" else x
    size = x.shape[2:]
    z = xhat * (1 + F.interpolate(gamma, size)) + F.interpolate(beta, size)
    return F.relu(z) if activation == "relu" else z

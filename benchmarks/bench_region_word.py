"""Region-word scores of all pairs: python benchmarks/bench_region_word.py --help"""

import torch
from common import Case, Shape, compiled, main, ours, wide
from torch import Tensor
from torch.nn import functional as F

from fastxm.ops import region_word_scores

SHAPES = {
    "cpu": [
        {"B": 16, "T": 17, "R": 256, "D": 384, "dtype": "float32"},
        {"B": 64, "T": 17, "R": 256, "D": 256, "dtype": "float32"},
        {"B": 64, "T": 17, "R": 256, "D": 256, "dtype": "bfloat16"},
    ],
    "cuda": [
        {"B": 64, "T": 17, "R": 256, "D": 768, "dtype": "bfloat16"},
        {"B": 256, "T": 17, "R": 256, "D": 768, "dtype": "bfloat16"},
        {"B": 256, "T": 17, "R": 256, "D": 768, "dtype": "tf32"},
    ],
    "quick": [{"B": 3, "T": 5, "R": 8, "D": 16, "dtype": "float32"}],
}
SMALL = {"B": 5}  # where providers are compared with float64
ALONE = {
    "cpu": [
        (name, {"B": 64, "T": 17, "R": 256, "D": 256, "dtype": "float32"})
        for name in ("fastxm", "AttnGAN loop", "eager")
    ],
    "cuda": [("fastxm", {"B": 256, "T": 17, "R": 256, "D": 768, "dtype": "bfloat16"})],
    "quick": [("fastxm", {"B": 3, "T": 5, "R": 8, "D": 16, "dtype": "float32"})],
}
SHARP = 5.0


def eager(regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    """Every pair at once: [B, B, T, R] attention and [B, B, T, D] contexts."""
    regions, words = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    cosines = torch.einsum("ird,tjd->tijr", regions, words)
    attention = (SHARP * wide(cosines)).softmax(-1).to(words.dtype)
    contexts = torch.einsum("tijr,ird->tijd", attention, regions)
    return pooled(F.cosine_similarity(contexts, words[:, None], dim=-1), lengths)


def per_picture(regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    """AttnGAN's form: a loop over pictures, each against all texts."""
    words = F.normalize(words, dim=-1)
    columns = []
    for picture in F.normalize(regions, dim=-1):
        attention = (SHARP * wide(words @ picture.T)).softmax(-1).to(words.dtype)
        columns.append(F.cosine_similarity(attention @ picture, words, dim=-1))
    return pooled(torch.stack(columns, dim=1), lengths)


def pooled(cosines: Tensor, lengths: Tensor) -> Tensor:
    """[B, B, T] -> [B, B]"""
    padding = torch.arange(cosines.shape[-1], device=cosines.device) >= lengths[:, None]
    logits = (SHARP * wide(cosines)).masked_fill(padding[:, None], -torch.inf)
    return logits.logsumexp(-1) / SHARP


def operations(words: int, b: int, r: int, d: int) -> tuple[float, float]:
    """Forward and both, without contexts where those are the larger (see the op).

    words: of all texts, without their padding.
    """
    pairs = words * b * r
    return (2 * d + 2 * min(r, d)) * pairs, (6 * d + 4 * r + 2 * max(d, r)) * pairs


def case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    b, t, r, d = (shape[key] for key in "BTRD")
    regions = F.normalize(torch.randn(b, r, d, device=device), dim=-1).to(dtype)
    words = F.normalize(torch.randn(b, t, d, device=device), dim=-1).to(dtype)
    lengths = torch.randint(2, t + 1, (b,), device=device)
    providers = {
        "eager": eager,
        "compiled": compiled(eager),
        **ours(region_word_scores, device),
        "AttnGAN loop": per_picture,
    }
    inputs = (regions.requires_grad_(), words.requires_grad_(), lengths)
    return Case(inputs, providers, operations(int(lengths.sum()), b, r, d))


def run(argv: list[str] | None = None) -> list[dict]:
    return main("region_word", SHAPES, case, argv, small=SMALL, alone=ALONE)


if __name__ == "__main__":
    run()

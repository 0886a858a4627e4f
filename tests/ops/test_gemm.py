import pytest
import torch

from fastxm import _C
from fastxm.ops import gemm
from fastxm.ops.dispatch import threads

# N, M, D
SHAPES = [
    (1, 1, 2),
    (5, 3, 6),
    (6, 64, 64),
    (7, 65, 514),
    (25, 300, 1026),
    (300, 70, 30),
    (481, 17, 6),  # three parts of rows
]


def product(a, y):
    """a yᵀ [N, M], float32, of rows a [N, D] and y [M, D] of one packed dtype."""
    (N, D), M = a.shape, len(y)
    out, panels = torch.full((N, M + 3), 7.0), gemm.pack(y)
    _C.gemm_cpu(
        *(a.dtype == torch.bfloat16, a.data_ptr(), D, N, panels.data_ptr(), D, M),
        *(out.data_ptr(), out.stride(0), threads()),
    )
    assert torch.equal(out[:, M:], torch.full((N, 3), 7.0))  # no further
    return out[:, :M].clone()


@pytest.mark.parametrize("dtype", gemm.PACKED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_float32_accumulators(shape, dtype):
    N, M, D = shape
    a, y = torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype)
    truth = a.double() @ y.double().T
    # sums of D terms in another order: the largest error of one draw is luck, their mean is not
    ours, plain = (
        (f - truth).square().mean().sqrt() for f in (product(a, y), a.float() @ y.float().T)
    )
    assert ours <= 2 * plain + torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", gemm.PACKED, ids=str)
def test_any_thread_count_gives_the_same_bits(dtype):
    a, y = torch.randn(500, 130).to(dtype), torch.randn(600, 130).to(dtype)
    one = product(a, y)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(one, product(a, y))
    finally:
        torch.set_num_threads(threads)


def test_operands():
    half, wide = torch.randn(3, 5).bfloat16(), torch.randn(2, 5)
    expected = torch.bfloat16 if torch.bfloat16 in gemm.PACKED else torch.float32
    x, _ = gemm.operands(half, half)
    assert x.dtype == expected
    assert torch.equal(x.float()[:, :5], half.float())
    assert x.shape[1] == (6 if expected == torch.bfloat16 else 5)
    assert {t.dtype for t in gemm.operands(half, wide)} == {torch.float32}
    assert {t.dtype for t in gemm.operands(half.half(), wide.half())} == {torch.float32}
    assert gemm.pack(wide.double()) is None

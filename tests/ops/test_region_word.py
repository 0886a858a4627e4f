import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse

from fastxm.ops import (
    backend,
    gemm,
    region_word_blocks,
    region_word_products,
    region_word_scores,
    region_word_tiles,
)
from fastxm.ops.region_word_op import gradients_of, scores_of

SHAPES = [  # B_image, R, D, B_text, T
    (1, 1, 1, 1, 1),
    (3, 4, 6, 3, 5),
    (2, 70, 8, 6, 3),
    (5, 17, 33, 4, 9),
    (4, 64, 64, 3, 17),
    (2, 40, 200, 24, 9),  # many words: |c|^2 by way of r rᵀ
    (3, 75, 66, 12, 17),  # several tiles of words, two panels of regions
    (2, 33, 70, 2, 110),  # a text that is longer than a tile
]
TILED = SHAPES[-2:]
FORMS = [
    {},
    {"attention_sharpness": 1.5, "pooling_sharpness": 9.0},
    {"word_softmax": True, "attention_sharpness": 4.0},
]


@pytest.fixture(params=[True, False], ids=["kept", "again"])
def _blocks(monkeypatch, request):
    monkeypatch.setattr(region_word_blocks, "BLOCK", 20_000)  # bytes: one picture, some, or all
    monkeypatch.setattr(region_word_tiles, "BLOCK", 60_000)
    if not request.param:
        monkeypatch.setattr(region_word_products, "KEPT", 0)


def formula(regions, words, lengths, attention_sharpness=5.0, pooling_sharpness=5.0,
            word_softmax=False):  # fmt: skip
    """Pair by pair, with the context vectors; products of half precision, the rest float32."""
    given = regions.dtype
    dtype = torch.promote_types(given, torch.float32)
    regions, words = regions.to(dtype), words.to(dtype)

    def product(a, b):
        return (a.to(given) @ b.to(given)).to(dtype)

    rows = []
    for text, n in zip(words, lengths.tolist()):
        w, row = text[:n], []
        for r in regions:
            if not word_softmax:
                r, w = F.normalize(r, dim=1), F.normalize(w, dim=1)
            s = product(w, r.T)
            s = s.softmax(0) if word_softmax else s
            context = product((attention_sharpness * s).softmax(1), r)
            m = F.cosine_similarity(w, context, dim=1, eps=1e-12)
            row.append((pooling_sharpness * m).logsumexp(0) / pooling_sharpness)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def inputs(B_image, R, D, B_text, T, device, dtype=torch.float32):
    regions, words = torch.randn(B_image, R, D, device=device), torch.randn(B_text, T, D)
    lengths = torch.randint(1, T + 1, (B_text,))
    return regions.to(dtype), words.to(device, dtype), lengths.to(device)


DRAWS = 36


def each_draw(f):
    """f of every draw by itself."""

    def stacked(*draws):
        outputs = [f(*draw) for draw in zip(*draws)]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs)
        return [torch.stack(group) for group in zip(*outputs)]

    return stacked


def draws(B_image, R, D, B_text, T, device, dtype=torch.float32):
    # the formula's largest error is of the rare contexts that are short: small draws have few. Of
    # halves it is the rounding of any of their products
    count = min(100, max(DRAWS, 70_000 // (B_image * R * D))) if dtype == torch.float32 else 12
    shape = (B_image, R, D, B_text, T)
    each = [inputs(*shape, device, dtype) for _ in range(count)]
    return [torch.stack(group) for group in zip(*each)]


def both(form, wrap=lambda f: f):
    """The op and the formula with the options of form, over draws."""
    return [each_draw(wrap(lambda *t, f=f: f(*t, **form))) for f in (region_word_scores, formula)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, form, dtype, device):
    no_worse(*both(form), *draws(*shape, device, dtype), of_draws=True)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, form, dtype, device):
    no_worse(*both(form, gradient), *draws(*shape, device, dtype), of_draws=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [8, 128])  # blocks, and tiles
@pytest.mark.parametrize(("B_image", "lengths"), [(3, []), (0, [2, 1]), (2, [0, 0])], ids=str)
def test_nothing_gives_nothing(B_image, lengths, D, dtype):
    regions = torch.randn(B_image, 40, D).to(dtype).requires_grad_()
    words = torch.randn(len(lengths), 5, D).to(dtype).requires_grad_()
    scores = region_word_scores(regions, words, torch.tensor(lengths, dtype=torch.long))
    assert scores.shape == (len(lengths), B_image)
    cotangents = torch.ones_like(scores) if sum(lengths) else torch.zeros_like(scores)
    for gradient_of in torch.autograd.grad(scores, (regions, words), cotangents):
        assert not gradient_of.any()


@pytest.mark.skipif(not gemm.PACKED, reason="no tile kernels for this CPU")
def test_contexts_much_shorter_than_regions():
    """Of one word the softmax over words is 1, so that a context is the mean of the regions."""
    form = {"word_softmax": True}

    def draw():
        regions, words, lengths = inputs(2, 64, 96, 240, 1, "cpu")
        return regions - regions.mean(1, keepdim=True) + 2e-3, words, lengths

    assert region_word_products.gram(*draw()[:2])
    draws = [torch.stack(group) for group in zip(*[draw() for _ in range(12)])]
    # 64 regions summed in order: 2.1 to 2.4 times, as with contexts for all; by r rᵀ alone 20
    no_worse(*both(form), *draws, factor=3.0, of_draws=True)
    no_worse(*both(form, gradient), *draws, of_draws=True)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives(form, name):
    regions, words, lengths = inputs(2, 4, 3, 3, 4, "cpu", torch.float64)
    leaves = [regions.requires_grad_(), words.requires_grad_()]
    with backend(name):
        f = lambda r, w: region_word_scores(r, w, lengths, **form)  # noqa: E731
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_padding_counts_for_nothing(form, name):
    regions, words, _ = inputs(3, 8, 6, 3, 5, "cpu")
    lengths = torch.tensor([5, 2, 0])
    rubbish = words.clone()
    rubbish[1, 2:], rubbish[2] = torch.nan, torch.inf
    words.requires_grad_()
    rubbish.requires_grad_()
    regions.requires_grad_()
    with backend(name):
        clean = region_word_scores(regions, words, lengths, **form)
        scores = region_word_scores(regions, rubbish, lengths, **form)
        truth = torch.autograd.grad(clean[:2].sum(), (regions, words))
        grads = torch.autograd.grad(scores[:2].sum(), (regions, rubbish))
    assert torch.equal(scores[:2], clean[:2])
    assert (scores[2] == -torch.inf).all()
    assert all(torch.equal(a, b) for a, b in zip(grads, truth))
    assert not grads[1][1, 2:].any()
    assert not grads[1][2].any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_invariances(form, device):
    regions, words, lengths = inputs(3, 20, 16, 4, 6, device, torch.float64)
    scores = region_word_scores(regions, words, lengths, **form)
    order = torch.randperm(20, device=device)
    torch.testing.assert_close(
        region_word_scores(regions[:, order], words, lengths, **form), scores
    )
    # one region: every context is its direction, every word's cosine a plain one
    one = regions[:, :1]
    cosine = F.cosine_similarity(words[:, None], one[None], dim=3)
    pooled = (5 * cosine[:, :, : int(lengths.min())]).logsumexp(2) / 5
    first = torch.full_like(lengths, int(lengths.min()))
    torch.testing.assert_close(region_word_scores(one, words, first), pooled)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("B_image", [1, 5])  # fewer than threads, and more
def test_two_runs_and_any_thread_count_give_the_same_bits(B_image, form, device):
    before = torch.get_num_threads()
    f = lambda *t: region_word_scores(*t, **form)  # noqa: E731
    tensors, results = inputs(B_image, 64, 64, 16, 17, device), []  # large enough to share
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        results.append([f(*tensors), *gradient(f)(*tensors)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif(not gemm.PACKED, reason="no tile kernels for this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_kept_pictures_give_the_same_bits(shape, form, dtype, monkeypatch):
    regions, words, lengths = inputs(*shape, "cpu", dtype)
    one = shape[3] * shape[4] * (shape[1] + shape[2]) * 4  # bytes of a picture
    f, results = lambda *t: region_word_scores(*t, **form), []
    for kept, block in ((64 << 20, 1 << 20), (one, 1), (0, 1 << 20)):
        monkeypatch.setattr(region_word_products, "KEPT", kept)
        monkeypatch.setattr(region_word_tiles, "BLOCK", block)
        results.append([f(regions, words, lengths), *gradient(f)(regions, words, lengths)])
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], TILED[0]], ids=str)
def test_a_nan_stays_one(shape, form, dtype):
    regions, words, _ = inputs(*shape, "cpu", dtype)
    lengths = torch.full((len(words),), shape[4])
    regions[1, 0, 0] = words[2, 0, 1] = torch.nan
    leaves = (regions.requires_grad_(), words.requires_grad_())
    scores = region_word_scores(*leaves, lengths, **form)
    wrong = torch.zeros_like(scores, dtype=torch.bool)
    wrong[:, 1] = wrong[2] = True
    assert torch.equal(scores.isnan(), wrong)
    dregions, dwords = torch.autograd.grad(scores.sum(), leaves)
    assert dregions.isnan().any(2).all()
    assert dwords.isnan().flatten(1).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], TILED[0]], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_backward_of_two_backends(shape, form, dtype):
    regions, words, lengths = inputs(*shape, "cpu", dtype)
    leaves = (regions.requires_grad_(), words.requires_grad_())
    f = lambda r, w: region_word_scores(r, w, lengths, **form)  # noqa: E731
    wanted = torch.autograd.grad(f(*leaves).sin().sum(), leaves)
    torch.compiler.reset()  # every case compiles the same code
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(*leaves)  # traced here, and then run under another backend
    for forward in (f, compiled):
        for first, second in (("reference", "cpu"), ("cpu", "reference")):
            with backend(first):
                loss = forward(*leaves).sin().sum()
            with backend(second):
                torch.testing.assert_close(torch.autograd.grad(loss, leaves), wanted)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5]], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pictures_by_turns(shape, form, monkeypatch):
    regions, words, lengths = inputs(*shape, "cpu", torch.float64)
    leaves = (regions.requires_grad_(), words.requires_grad_())
    whole = region_word_scores(regions, words, lengths, **form)
    wanted = torch.autograd.grad(whole.sin().sum(), leaves)
    monkeypatch.setattr(region_word_blocks, "BLOCK", 1)  # one picture at a time
    scores = region_word_scores(regions, words, lengths, **form)
    torch.testing.assert_close(scores, whole)
    torch.testing.assert_close(torch.autograd.grad(scores.sin().sum(), leaves), wanted)
    # one gradient alone is the same
    for i in range(2):
        pair = [t if j == i else t.detach() for j, t in enumerate(leaves)]
        scores = region_word_scores(*pair, lengths, **form)
        torch.testing.assert_close(torch.autograd.grad(scores.sin().sum(), leaves[i])[0], wanted[i])


def test_extreme_sharpness(device):
    # no attention: every context is the mean region
    form = {"attention_sharpness": 0.0, "pooling_sharpness": 300.0}
    no_worse(*both(form), *draws(3, 20, 16, 4, 6, device))
    no_worse(*both(form, gradient), *draws(3, 20, 16, 4, 6, device))
    # hard attention over an orthonormal basis: every cosine is the largest coordinate
    words = torch.randn(4, 6, 16, device=device, dtype=torch.float64, requires_grad=True)
    lengths, regions = torch.full((4,), 6, device=device), torch.eye(16, device=device)[None]
    scores = region_word_scores(
        regions.to(words), words, lengths, attention_sharpness=1e6, pooling_sharpness=1e3
    )
    truth = (1e3 * F.normalize(words, dim=2).amax(2)).logsumexp(1, keepdim=True) / 1e3
    torch.testing.assert_close(scores, truth)
    grads = [torch.autograd.grad(t.sum(), words)[0] for t in (scores, truth)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_empty(name):
    regions, words, lengths = inputs(3, 4, 6, 2, 5, "cpu")
    with backend(name):
        assert region_word_scores(regions[:0], words, lengths).shape == (2, 0)
        assert region_word_scores(regions, words[:0], lengths[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("regions", "words", "lengths"),
    [
        ((3, 4, 6), (3, 5, 7), (3,)),
        ((3, 6), (3, 5, 6), (3,)),
        ((3, 4, 6), (3, 5, 6), (2,)),
        ((3, 0, 6), (3, 5, 6), (3,)),
    ],
)
def test_wrong_shapes(regions, words, lengths):
    with pytest.raises(ValueError):
        region_word_scores(
            torch.ones(regions), torch.ones(words), torch.ones(lengths, dtype=torch.long)
        )


def test_wrong_types():
    ones = torch.ones(2, 2, 2)
    with pytest.raises(ValueError, match="integers"):
        region_word_scores(ones, ones, torch.ones(2))
    with pytest.raises(ValueError, match="integers"):
        region_word_scores(ones, ones, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError):
        region_word_scores(ones, ones.long(), torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("depth", [6, 64])
def test_opcheck(depth, device):
    regions, words, lengths = inputs(3, 4, depth, 2, 5, device)
    leaves = (regions.requires_grad_(), words.requires_grad_(), lengths)
    whole = torch.full_like(lengths, 5)  # what is kept for padding is not written
    for word_softmax, name in itertools.product((False, True), ("cpu", "reference")):
        options = (5.0, 4.0, word_softmax)
        with backend(name):
            torch.library.opcheck(scores_of, (*leaves[:2], whole, *options, False))
            plain = [t.detach() for t in leaves[:2]]
            scores, kept = scores_of(*plain, whole, *options, True)
            for of_words in (False, True):
                torch.library.opcheck(
                    gradients_of, (scores, *plain, whole, kept, *options, of_words)
                )
        if name == "cpu":  # the reference keeps NaN, which opcheck holds for a difference
            torch.library.opcheck(scores_of, (*leaves[:2], whole, *options, True))


def test_dispatch(device):
    regions, words, lengths = inputs(3, 4, 6, 2, 5, device)
    leaves = (regions.requires_grad_(), words.requires_grad_(), lengths)
    compiled = torch.compile(region_word_scores, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), region_word_scores(*leaves))
    with torch.autocast(device, torch.bfloat16):
        scores = region_word_scores(regions.bfloat16(), words.bfloat16(), lengths)
    assert scores.dtype == torch.float32
    half = (regions.bfloat16().float(), words.bfloat16().float(), lengths)
    torch.testing.assert_close(scores, region_word_scores(*half))
    with backend("triton"), pytest.raises(RuntimeError, match="no triton backend"):
        region_word_scores(regions.double(), words.double(), lengths)


def sines(shape, a, c):
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + c).view(shape)


def test_golden():
    scores = region_word_scores(
        sines((3, 4, 6), 0.7, 0.3), sines((3, 5, 6), 1.3, 0.1), torch.tensor([3, 5, 2])
    )
    truth = [
        [38.67871, 38.69868, 37.03565],
        [41.04654, 42.57520, 42.40405],
        [31.76589, 33.10165, 33.89591],
    ]
    torch.testing.assert_close(50 * scores, torch.tensor(truth).double(), rtol=0, atol=1e-5)

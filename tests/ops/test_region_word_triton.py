"""The Triton kernels of region_word: in the interpreter on a CPU, and on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse
from test_region_word import FORMS, formula, inputs
from triton import language as tl
from triton.runtime import interpreter

from fastxm.ops import backend, region_word_op, region_word_scores, region_word_strips
from fastxm.ops import region_word_products as products
from fastxm.ops import region_word_triton as triton
from fastxm.ops.region_word_rows import Texts

SHAPES = [  # B_image, R, D, B_text, T
    (1, 1, 2, 1, 1),
    (3, 4, 6, 3, 5),
    (2, 70, 8, 4, 3),
    (2, 33, 40, 4, 9),  # |c|^2 by way of r rᵀ
    (2, 65, 80, 10, 9),  # more words and regions than a tile has
]
OPTIONS = [(5.0, 5.0, False), (4.0, 9.0, True)]


@pytest.fixture(autouse=True)
def _triton():
    with backend("triton"):
        yield


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["kept", "again"])
def _kept(monkeypatch, request):
    """What a GPU keeps of the forward, or nothing; words not counted; a picture at a time."""

    def shape(regions, words, keep):
        wanted = keep and request.param == "kept"
        return (len(regions), words.shape[0] * words.shape[1], 1) if wanted else (0, 0, 0)

    monkeypatch.setattr(products, "kept_shape", shape)
    monkeypatch.setattr(region_word_strips, "Texts", partial(Texts, counted=False))
    monkeypatch.setattr(region_word_strips, "STRIP", 1)


def both(form, wrap=lambda f: f):
    return [wrap(lambda *t, f=f: f(*t, **form)) for f in (region_word_scores, formula)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, form, device):
    no_worse(*both(form), *inputs(*shape, device), factor=4)  # of one draw, which may be lucky


@pytest.mark.usefixtures("_kept")
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, form, device):
    no_worse(*both(form, gradient), *inputs(*shape, device), factor=4)


@pytest.fixture
def _bfloat16(monkeypatch):
    """Mends the interpreter's products, which takes the bits of bfloat16 for integers."""
    if torch.cuda.is_available():
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("u4") << 16).view("f4"), tl.float32)

    def create_dot(self, a, b, *given):
        return plain(self, wide(a), wide(b), *given)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_halves(shape, options, dtype, device):
    # as a GPU takes them: on a CPU the front door makes words float32
    regions, words, lengths = inputs(*shape, device, dtype)
    sharp, pool, word_softmax = options
    form = {"attention_sharpness": sharp, "pooling_sharpness": pool, "word_softmax": word_softmax}

    def rows(words):
        return words if word_softmax else F.normalize(words, dim=-1)

    def ours(regions, words):
        kept = regions.new_empty(len(regions), words.shape[0] * words.shape[1], 1).float()
        return triton.fwd(regions, rows(words), lengths, kept, *options)

    # the interpreter cuts bfloat16 off, which errs twice as far, and always to one side
    factor = 8 if dtype == torch.bfloat16 and device == "cpu" else 2
    no_worse(ours, lambda *t: formula(*t, lengths, **form), regions, words, factor=factor)
    dscores = torch.randn(len(words), len(regions), device=device)

    def ours_bwd(regions, words):
        leaf = words.detach().requires_grad_()
        unit = rows(leaf)
        given = (dscores, regions, unit.detach(), lengths, regions.new_empty(0, 0, 0).float())
        dregions, dunit = triton.bwd(*given, *options, of_words=True)
        return dregions, torch.autograd.grad(unit, leaf, dunit)[0] if unit is not leaf else dunit

    def plain_bwd(regions, words):
        leaves = [regions.detach().requires_grad_(), words.detach().requires_grad_()]
        scores = formula(*leaves, lengths, **form)
        return torch.autograd.grad(scores, leaves, dscores.to(scores))

    no_worse(ours_bwd, plain_bwd, regions, words, factor=factor)


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_padding_counts_for_nothing(form, device):
    regions, words, _ = inputs(2, 8, 6, 3, 5, device)
    lengths = torch.tensor([5, 2, 0], device=device)
    rubbish = words.clone()
    rubbish[1, 2:], rubbish[2] = torch.nan, torch.inf
    clean, scores = (region_word_scores(regions, w, lengths, **form) for w in (words, rubbish))
    assert torch.equal(scores, clean)
    assert (scores[2] == -torch.inf).all()

    def some(regions, words):
        return region_word_scores(regions, words, lengths, **form)[:2]

    found, truth = (gradient(some)(regions, w) for w in (rubbish, words))
    assert all(torch.equal(a, b) for a, b in zip(found, truth))
    assert not found[1][1, 2:].any()
    assert not found[1][2].any()


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_no_words_at_all(form, device):
    regions, words, lengths = inputs(2, 8, 6, 3, 5, device)
    leaves = (regions.requires_grad_(), words.requires_grad_())
    scores = region_word_scores(*leaves, torch.zeros_like(lengths), **form)
    assert (scores == -torch.inf).all()
    for grad in torch.autograd.grad(scores[:0].sum() + 0 * scores.nan_to_num().sum(), leaves):
        assert not grad.any()
    assert region_word_scores(regions[:0], words, lengths, **form).shape == (3, 0)
    assert region_word_scores(regions, words[:0], lengths[:0], **form).shape == (0, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_what_is_not_finite_stays_visible(form, bad, device):
    regions, words, lengths = inputs(3, 40, 48, 2, 5, device)
    clean = region_word_scores(regions, words, lengths, **form)
    regions[1, 7, 3] = bad
    scores = region_word_scores(regions, words, lengths, **form)
    assert not scores[:, 1].isfinite().any()
    assert torch.equal(scores[:, ::2], clean[:, ::2])
    dregions, dwords = gradient(lambda *t: region_word_scores(*t, lengths, **form))(regions, words)
    assert not dregions[1].isfinite().all()
    assert dregions[::2].isfinite().all()
    assert not dwords.isfinite().all()


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_strided_inputs_and_the_same_bits_twice(form, device):
    regions, words, lengths = inputs(3, 20, 16, 4, 6, device)
    f = lambda *t: region_word_scores(*t, lengths, **form)  # noqa: E731
    results = []
    for strides in (lambda t: t, lambda t: t, lambda t: t.mT.contiguous().mT):
        given = strides(regions), strides(words)
        results.append([f(*given), *gradient(f)(*given)])
    once, twice, strided = results
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    torch.testing.assert_close(strided, once)  # the norms are summed in another order


def test_second_order(device):
    regions, words, lengths = inputs(2, 6, 5, 2, 3, device)
    leaves = (regions.requires_grad_(), words.requires_grad_())

    def penalty():
        scores = region_word_scores(*leaves, lengths)
        grads = torch.autograd.grad(scores.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    found = penalty()
    with backend("reference"):
        torch.testing.assert_close(found, penalty(), rtol=1e-4, atol=1e-5)


def test_dispatch(device):
    regions, words, lengths = inputs(2, 4, 6, 2, 3, device)
    leaves = (regions.requires_grad_(), words.requires_grad_())
    for word_softmax in (False, True):
        options = (5.0, 4.0, word_softmax)
        torch.library.opcheck(region_word_op.scores_of, (*leaves, lengths, *options, False))
        plain = [t.detach() for t in leaves]
        scores, kept = region_word_op.scores_of(*plain, lengths, *options, False)
        given = (scores, *plain, lengths, kept, *options, True)
        torch.library.opcheck(region_word_op.gradients_of, given)
    compiled = torch.compile(region_word_scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves, lengths), region_word_scores(*leaves, lengths))

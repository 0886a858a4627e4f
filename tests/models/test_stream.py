"""STREAM: what its loss counts, where it begins and ends; beams find the likeliest text."""

import itertools

import pytest
import torch
from eye import Eye
from torch.nn import functional as F

from fastxm.models.stream import STREAM, STREAMConfig

WORDS = ("red", "apple")


def tiny(**fields) -> STREAM:
    torch.manual_seed(0)
    plain = {"vocabulary": WORDS, "words": 4, "embedding": 5, "hidden": 6, "image_width": 12}
    model = STREAM(STREAMConfig(**{**plain, **fields})).eval()
    model._encoders["image"] = Eye()
    torch.nn.init.normal_(model.word.weight, std=2.0)  # texts that differ in likelihood
    return model


def surprise(model, whole, text):
    """-log p of a text and its end, word by word, for one picture [1, G]."""
    state, inputs, total = None, model.norm(model.image(whole))[:, None], 0.0
    for word in [*text, 0]:
        out, state = model.lstm(inputs, state)
        total = total - model.word(out[0, 0]).log_softmax(0)[word]
        inputs = model.embedding(torch.tensor([[word]]))
    return total


def test_nll_is_of_every_word_and_the_end():
    model, whole = tiny(), torch.randn(2, 12)
    tokens, lengths = torch.tensor([[2, 3, 2, 0], [3, 0, 0, 0]]), torch.tensor([3, 1])
    nll = model.nll(whole, tokens, lengths)
    assert nll.shape == (2, 5)
    assert nll[0, 4] == 0
    assert nll[1, 2:].abs().max() == 0
    expected = [surprise(model, whole[:1], [2, 3, 2]), surprise(model, whole[1:], [3])]
    torch.testing.assert_close(nll.sum(1), torch.stack(expected))
    torch.testing.assert_close(model.loss(whole, tokens, lengths), sum(expected) / 6)
    # words that it is not told it still has to say: the first two places do not depend on them
    given = torch.tensor([[2, 1, 1, 0], [3, 0, 0, 0]])
    told = model.nll(whole, tokens, lengths, given=given)
    torch.testing.assert_close(told[:, :2], nll[:, :2])
    assert not torch.equal(told[0, 2], nll[0, 2])
    # what stands in the padding does not matter
    tokens[1, 1:] = 3
    later = model.nll(whole, tokens, lengths)[1, 0]
    torch.testing.assert_close(later, nll[1, 0])


def test_beams_find_the_likeliest_text():
    model, whole = tiny(), torch.randn(3, 12)
    texts = [t for n in range(3) for t in itertools.product((2, 3), repeat=n)]
    found = model.search(whole, 64, 2)
    greedy = model.search(whole, 1, 2)
    for row in range(3):
        each = {t: surprise(model, whole[row : row + 1], t).item() / (len(t) + 1) for t in texts}
        best = min(each, key=each.get)
        ours = tuple(x for x in found[row].tolist() if x)
        assert ours == best
        assert each[best] <= each[tuple(x for x in greedy[row].tolist() if x)] + 1e-6


def test_greedy_takes_the_likeliest_word():
    model, whole = tiny(), torch.randn(1, 12)
    out, _ = model.lstm(model.start(whole))
    logits = model.word(out[0, 0])
    logits[1] = -torch.inf  # the unknown word is never written
    assert model.search(whole, 1, 5)[0, 0] == logits.argmax()


def test_captions_are_texts_of_its_words():
    model = tiny().train()
    images = torch.rand(5, 3, 16, 16)
    for beams in (1, 3):
        texts = model.caption(images, beams=beams, max_words=3, batch_size=2)
        assert len(texts) == 5
        assert all(set(text.split()) <= set(WORDS) and len(text.split()) <= 3 for text in texts)
        assert texts == model.caption(images, beams=beams, max_words=3)
    assert model.training
    with pytest.raises(ValueError, match="beams is at least 1"):
        model.caption(images, beams=0)
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\]"):
        model.caption(images[0])


def test_the_lstm_stays_differentiable_on_a_gpu():
    model = tiny()
    assert not model.training
    assert model.lstm.training  # cuDNN's backward needs it; there is no dropout in it
    whole = torch.randn(1, 12, requires_grad=True)
    model.loss(whole, torch.tensor([[2]]), torch.tensor([1])).backward()
    assert whole.grad.abs().sum() > 0


def test_it_learns_to_tell_pictures_apart():
    model = tiny().train()
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]).repeat(4, 1, 1, 1)
    tokens, lengths = torch.tensor([[2, 3], [3, 0]]).repeat(4, 1), torch.tensor([2, 1]).repeat(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = model.loss(Eye()(images), tokens, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.caption(images[:2], beams=2) == ["red apple", "apple"]


@pytest.mark.parametrize("fields", [{"hidden": 0}, {"words": 0}, {"dropout": 1.0}])
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        STREAMConfig(vocabulary=WORDS, **fields)


def test_round_trip(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = STREAM.from_pretrained(tmp_path)
    again._encoders["image"] = Eye()
    images = F.interpolate(torch.rand(2, 3, 4, 4), (16, 16))
    assert again.caption(images) == model.caption(images)

"""STEM and DAMSM: each caption is read alone, whatever stands beside it or in the padding."""

import pytest
import torch
from eye import Eye

from fastxm.encoders.damsm import DAMSM, DAMSMConfig
from fastxm.encoders.stem import STEM, STEMConfig
from fastxm.nn.text import _from_both_ends, both_ways

WORDS = ("red", "apple", "frog", "a")


def stem() -> STEM:
    torch.manual_seed(0)
    return STEM(STEMConfig(WORDS, words=5, embedding=4, width=6)).eval()


def test_captions_are_read_one_by_one():
    model = stem()
    captions = ["frog", "a red apple", "red red frog a apple red"]
    found = model(captions)
    assert found.words.shape == (3, 5, 6)
    assert found.lengths.tolist() == [1, 3, 5]
    for row, caption in enumerate(captions):
        words, sentence, (n,) = model([caption])
        torch.testing.assert_close(found.words[row], words[0])
        torch.testing.assert_close(found.sentence[row], sentence[0])
        assert words[0, n:].abs().sum() == 0


def test_the_sentence_is_both_ends():
    words, sentence, lengths = stem()(["a red apple"])
    torch.testing.assert_close(sentence[0, :3], words[0, lengths[0] - 1, :3])  # forward, last word
    torch.testing.assert_close(sentence[0, 3:], words[0, 0, 3:])  # backward, first word


def test_padding_is_not_read():
    model = stem()
    tokens, lengths = torch.tensor([[2, 3, 0, 0]]), torch.tensor([2])
    other = torch.tensor([[2, 3, 4, 5]])
    for a, b in zip(model.read(tokens, lengths), model.read(other, lengths)):
        torch.testing.assert_close(a, b)


def test_a_gpu_reads_the_same_without_packing():
    lstm = stem().lstm
    words, lengths = torch.randn(4, 5, 4), torch.tensor([5, 1, 3, 2])
    found = []
    for read in (both_ways, _from_both_ends):
        given = words.clone().requires_grad_()
        states, ends = read(lstm, given, lengths)
        loss = (states * torch.arange(30.0).view(5, 6).sin()).sum() + ends.square().sum()
        found.append((states, ends, *torch.autograd.grad(loss, (given, *lstm.parameters()))))
    for packed, twice in zip(*found):
        torch.testing.assert_close(packed, twice)


@pytest.mark.parametrize("fields", [{"width": 7}, {"words": 0}, {"dropout": 1.0}])
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        STEMConfig(WORDS, **fields)


def test_a_stem_has_a_vocabulary():
    with pytest.raises(ValueError, match="one or more words"):
        STEM(STEMConfig())


def test_damsm_s_own_layers_begin_within_a_tenth_of_0():
    wide = STEMConfig(WORDS, embedding=100, width=200)
    model = DAMSM(DAMSMConfig(wide, region_width=30, image_width=40))
    for layer in (model.stem.embedding, model.region, model.image):
        assert 0.095 < layer.weight.abs().max() <= 0.1
        assert layer.weight.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.1)


def test_damsm_looks_and_projects(tmp_path):
    torch.manual_seed(0)
    config = DAMSMConfig(stem().config, region_width=3, image_width=12)
    model = DAMSM(config).eval()
    model._encoders["image"] = Eye()
    images = torch.rand(2, 3, 16, 16)
    regions, whole = model.look(images)
    assert regions.shape == (2, 16, 3)
    torch.testing.assert_close(
        regions[:, 5], images.unflatten(2, (4, 4)).unflatten(4, (4, 4))[:, :, 1, :, 1].mean((2, 3))
    )
    regions, image = model.project(regions, whole)
    assert (regions.shape, image.shape) == ((2, 16, 6), (2, 6))
    embedded = model.embed_images(images)
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(image, dim=1))
    torch.testing.assert_close(model.embed_text(["frog"]).norm(dim=1), torch.ones(1))
    model.save_pretrained(tmp_path)
    assert DAMSM.from_pretrained(tmp_path).config == config

"""The dual encoder's training: concepts come apart, and the same run gives the same heads."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.training.dual_encoder import (
    DualEncoderTraining,
    Pairs,
    cached_dual_encoder,
    fit,
    groups,
    train_dual_encoder,
)
from fastxm.training.ranks import Ranks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
SMALL = DualEncoderConfig(hidden=16, width=8)


def noisy(colour, seed):
    noise = np.random.default_rng(seed).integers(-20, 20, (8, 8, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one colour each, some of them held out."""
    root = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        for i in range(8):
            Image.fromarray(noisy(colour, i)).save(root / f"{name}-{i}.png")
            (root / f"{name}-{i}.txt").write_text(f"a {name} square\n{name}\n")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_training_separates_concepts_and_repeats(folder, cache, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(cache))
    config = DualEncoderTraining(SMALL, str(folder), image_size=8, epochs=20, batch_size=6)
    state = torch.random.get_rng_state()
    model, _ = train_dual_encoder(config, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    unseen = np.stack([noisy(colour, 99) for colour in COLOURS.values()])
    images = torch.from_numpy(unseen).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        texts = model.embed_text([f"a {name} square" for name in COLOURS])
        scores = texts @ model.embed_images(images).T
    assert scores.argmax(1).tolist() == [0, 1, 2]
    # the cached one is the same model, and is trained once
    cached = cached_dual_encoder(config, progress=False)
    for key, value in model.state_dict().items():
        assert torch.equal(cached.state_dict()[key], value), key
    monkeypatch.setattr("fastxm.training.dual_encoder.fit", None)
    cached_dual_encoder(config, progress=False)


def test_updates_follow_a_cosine_and_leave_one_concept_s_pairs_out(monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        plain = {"image_width": 5, "text_width": 3, "image_dropout": 0.0, "text_dropout": 0.0}
        ours = DualEncoder(DualEncoderConfig(hidden=6, width=4, **plain))
        images, text, labels = torch.randn(8, 5), torch.randn(8, 3), torch.tensor([0, 1, 1, 2] * 2)
        monkeypatch.setattr(torch, "randperm", torch.arange)
        pairs = Pairs(images, None, np.arange(8), np.ones(8, int), labels, [""] * 8)
        monkeypatch.setattr(Pairs, "sentences", lambda self, index, number: text[index])
        theirs = copy.deepcopy(ours)
        fit(ours, pairs, DualEncoderTraining(epochs=3, batch_size=4), False, Ranks())

        seen = (images - images.mean(0)) / images.std(0)
        said = F.normalize(text, dim=1) * math.sqrt(3)
        matrices = [p for p in theirs.parameters() if p.ndim == 2]
        others = [p for p in theirs.parameters() if p.ndim < 2]
        adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            1e-3,
            (0.9, 0.999),
        )
        for update in range(6):
            rows = slice(4 * (update % 2), 4 * (update % 2) + 4)
            a, b = theirs.image_head(seen[rows]), theirs.text_head(said[rows])
            scores = theirs.logit_scale.exp() * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
            alike = (labels[rows, None] == labels[rows]) & ~torch.eye(4, dtype=torch.bool)
            assert alike.any()
            scores, right = scores.masked_fill(alike, -torch.inf), torch.arange(4)
            loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
            adam.zero_grad()
            loss.backward()
            for group in adam.param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(math.pi * update / 6)) / 2
            adam.step()
        found, expected = (dict(network.named_parameters()) for network in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    finally:
        torch.set_default_dtype(torch.float32)


def test_only_matrices_decay():
    decay, none = groups(DualEncoder(SMALL), 0.1)
    assert (decay["weight_decay"], none["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decay["params"]} == {2}
    assert sorted(len(p) if p.ndim else 0 for p in none["params"]) == [0, 8, 8, 16, 16]


def test_training_refuses_no_epochs():
    with pytest.raises(ValueError, match="epochs"):
        DualEncoderTraining(epochs=0)

"""The protocol on tiny pictures: what a perfect and a blind generator get."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fastxm.data import open_dataset
from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.evaluation import FrechetJudge, evaluate
from fastxm.evaluation.evaluator import Captions, Evaluation, caption_pools, mean_colours

SIZE = 8


@dataclass
class Config:
    pass


class Moments(torch.nn.Module):
    """An image encoder: mean and variance of each channel, the same bits in any batch."""

    name, width = "moments", 6

    def embed(self, images):
        values = (images * 255).round().flatten(2)  # [N, 3, 64]: their sums are exact in float32
        mean = values.sum(2) / values.shape[2]
        square = values.square().sum(2) / values.shape[2]
        return torch.cat([mean, square - mean.square()], 1) / 255


class Recalling(torch.nn.Module):
    """A perfect generator, which knows the picture of every caption; untrained it knows none."""

    text_encoder, image_size = object(), SIZE

    def __init__(self, config, pictures=None):
        super().__init__()
        self.config, self.pictures, self.noise = config, pictures, []

    def attach(self, encoder):
        assert encoder is self.text_encoder

    def generate(self, captions, *, seed=None):
        assert seed is None
        self.noise.append(torch.rand(len(captions)))
        if self.pictures is None:
            return torch.zeros(len(captions), 3, SIZE, SIZE)
        return torch.stack([self.pictures[caption] for caption in captions])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for i in range(60):
        pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"number {i}\n")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path_factory.getbasetemp() / "evaluator"))


@pytest.fixture(scope="module")
def dual():
    model = DualEncoder(DualEncoderConfig(image_width=Moments.width, hidden=16, width=8)).eval()
    model._encoders["image"] = Moments()
    return model


@pytest.fixture
def judge(folder):
    return FrechetJudge(open_dataset(folder, SIZE, progress=False), Moments(), progress=False)


def test_a_perfect_generator_is_as_good_as_real_pictures(folder, dual):
    parts = [open_dataset(folder, SIZE, split, progress=False) for split in ("train", "val")]
    pictures = {d.captions[i][0]: d.image(i) for d in parts for i in range(len(d))}
    model = Recalling(Config(), pictures)
    state = torch.random.get_rng_state()
    report = evaluate(model, dual, str(folder), pool=100, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    distance = {name: found["EffLite0-FD"] for name, found in report["distance"].items()}
    assert distance["training captions"] == distance["real against real"]
    assert distance["untrained generator"] > distance["mean colours"]
    assert distance["mean colours"] > distance["real against real"]
    # its pictures of held-out captions are the held-out pictures, so each finds what they find
    retrieval = report["retrieval"]
    assert retrieval["generated"] == retrieval["real"]
    assert retrieval["chance"]["of"] == len(parts[1])


def test_every_distance_says_of_how_many_pictures(folder, dual):
    sizes = [len(open_dataset(folder, SIZE, part, progress=False)) for part in ("train", "val")]
    real, held_out = sizes[0] // 2, sizes[1]
    assert 1 < held_out < real
    found = evaluate(Recalling(Config()), dual, str(folder), progress=False)["distance"]
    counts = {name: (row["pictures"], row["sources"]) for name, row in found.items()}
    few = ("held-out pictures", "real against real, as few")
    assert {counts.pop(name) for name in few} == {(held_out, held_out)}
    assert counts.pop("held-out captions") == (real, held_out)
    assert set(counts.values()) == {(real, real)}


def test_judge_knows_its_own_pictures(judge):
    own, others = (judge.dataset.batch(rows) for rows in (judge.rows, judge.other_rows))
    assert not set(judge.rows.tolist()) & set(judge.other_rows.tolist())
    distance = torch.tensor(judge.of(judge.encoder.embed(own))["EffLite0-FD"], dtype=torch.float64)
    torch.testing.assert_close(distance, torch.zeros_like(distance))
    assert judge.of(judge.encoder.embed(others)) == judge.of(judge.others)


def test_pictures_have_noise_of_their_own_that_repeats(judge, dual):
    model = Recalling(Config())
    evaluation = Evaluation(model, dual, judge, pool=10, seed=3, progress=False)
    for _ in range(2):
        evaluation.draw(["one"] * 5, "captions", chunk=3)
    first, second = torch.cat(model.noise).view(2, 5)
    assert torch.equal(first, second)
    assert len(first.unique()) == 5


def test_judge_refuses_too_few(folder):
    dataset = open_dataset(folder, SIZE, progress=False)
    with pytest.raises(ValueError, match="at least 4 pictures"):
        FrechetJudge(dataset.select([0, 1, 2]), Moments(), progress=False)


def test_mean_colours_are_one_colour_each(folder):
    dataset = open_dataset(folder, SIZE, progress=False).select([0, 5])
    flat = mean_colours(dataset)
    assert (flat.images == flat.images[:, :1, :1]).all()
    error = flat.images[:, 0, 0] - dataset.images.mean((1, 2))
    assert np.abs(error).max() <= 0.5  # of a level: that of rounding


def test_pools_hold_a_concept_once_and_one_kind():
    groups, kinds = np.array(list("aabbccdd") * 2), np.array(["x"] * 8 + ["y"] * 8)
    captions = Captions([""] * 16, np.arange(16), groups, kinds)
    for pool in caption_pools(captions, 3, seed=0):
        assert len(set(groups[pool])) == len(pool) == 3
        assert len(set(kinds[pool])) == 1
    # too few concepts: as many as there are, of all kinds
    assert {len(pool) for pool in caption_pools(captions, 9, seed=0)} == {4}

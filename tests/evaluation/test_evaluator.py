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
    image_size: int = SIZE


class Recalling(torch.nn.Module):
    """A perfect generator, which knows the picture of every caption; untrained it knows none."""

    def __init__(self, config, pictures=None):
        super().__init__()
        self.config, self.pictures, self.noise = config, pictures, []

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
    return DualEncoder(DualEncoderConfig(hidden=16, width=8)).eval()


def test_a_perfect_generator_is_as_good_as_real_pictures(folder, dual):
    parts = [open_dataset(folder, SIZE, split, progress=False) for split in ("train", "val")]
    pictures = {d.captions[i][0]: d.image(i) for d in parts for i in range(len(d))}
    model = Recalling(Config(), pictures)
    state = torch.random.get_rng_state()
    report = evaluate(model, dual, str(folder), pool=100, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    distance = report["distance"]
    assert distance["training captions"] == pytest.approx(distance["real against real"], rel=1e-4)
    assert distance["untrained generator"] > 2 * distance["real against real"]
    assert distance["mean colours"] > 2 * distance["real against real"]
    # its pictures of held-out captions are the held-out pictures, so each finds what they find
    retrieval = report["retrieval"]
    assert retrieval["generated"] == retrieval["real"]
    assert retrieval["chance"]["of"] == len(parts[1])


def test_judge_knows_its_own_pictures(folder):
    judge = FrechetJudge(open_dataset(folder, SIZE, progress=False), progress=False)
    own, others = judge.dataset.batch(judge.rows), judge.dataset.batch(judge.other_rows)
    assert not set(judge.rows.tolist()) & set(judge.other_rows.tolist())
    assert judge(own) < 1e-3 * judge.baseline
    assert judge(others) == pytest.approx(judge.baseline, rel=1e-4)


def test_pictures_have_noise_of_their_own_that_repeats(folder, dual):
    judge = FrechetJudge(open_dataset(folder, SIZE, progress=False), progress=False)
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
        FrechetJudge(dataset.select([0, 1, 2]), progress=False)


def test_mean_colours_are_one_colour_each(folder):
    dataset = open_dataset(folder, SIZE, progress=False).select([0, 5])
    flat = mean_colours(dataset)
    assert (flat.images == flat.images[:, :1, :1]).all()
    error = flat.images[:, 0, 0] - dataset.images.mean((1, 2))
    assert np.abs(error).max() <= 0.5


def test_pools_hold_a_concept_once_and_one_kind():
    groups, kinds = np.array(list("aabbccdd") * 2), np.array(["x"] * 8 + ["y"] * 8)
    captions = Captions([""] * 16, np.arange(16), groups, kinds)
    for pool in caption_pools(captions, 3, seed=0):
        assert len(set(groups[pool])) == len(pool) == 3
        assert len(set(kinds[pool])) == 1
    # too few concepts: as many as there are, of all kinds
    assert {len(pool) for pool in caption_pools(captions, 9, seed=0)} == {4}

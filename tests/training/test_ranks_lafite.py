"""LAFITE and VDL in several processes against one, in float64: numbers, and resuming on others."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from small import pictures
from small_joint import lafite, prepare, vdl
from tiny_clip import write

from fastxm.nn.stylegan import GROUP, with_deviation
from fastxm.training import checkpoint
from fastxm.training.ranks import Ranks, Shares
from fastxm.training.trainer import LoopConfig, train

SIZE = 2  # processes: of 12 pictures they have 4 and 8
SHORT, WHOLE = (LoopConfig(steps=steps, log_every=1, checkpoint_every=9) for steps in (2, 4))
OPTIONS = {"precision": "fp32", "batch_size": 12, "label_fraction": 0.5,
           "augment": "color,translation,cutout"}  # fmt: skip
RUNS = {
    # R1 and the path length are of every second step; the perturbation has the first
    "lafite": (
        lafite,
        {"perturbation": "trained", "logit": "batch"},
        {"perturbation_steps": 1, "contrast": "sharpened", "picture_weight": 1.0},
    ),
    # each stage; the KL is 0, then 1e-6 in the second
    "vdl": (
        vdl,
        {"conditioning": "pair"},
        {
            "adversarial_steps": 1,
            "posterior_steps": 2,
            "supervision_batch": 5,
            "kl_target": 1e-6,
            "kl_warmup": 0.0,
        },
    ),
    "joint": (
        vdl,
        {"family": "vmf", "discriminator": "projected", "head_width": 2, "picture_width": 2},
        {
            "schedule": "joint",
            "adversarial_steps": 0,
            "label_fraction": 1.0,
            "supervision_batch": 3,
            "path_every": 0,
            "r1_every": 0,
        },
    ),
}


def made(name, folder):
    make, model, options = RUNS[name]
    return make(folder / "pictures", folder / "clip", model, **{**OPTIONS, **options})


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    prepare(pytest.MonkeyPatch())
    for name in RUNS:
        train(made(name, folder), folder / name / "from ranks", SHORT)
        train(made(name, folder), folder / name / "to ranks", WHOLE, resume=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pictures(folder / "pictures")
    write(folder / "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTXM_DATA", str(folder / "cache"))
        prepare(patch)
        try:
            for name in RUNS:
                train(made(name, folder), folder / name / "one process", WHOLE)
                train(made(name, folder), folder / name / "to ranks", SHORT)
            torch.multiprocessing.spawn(run_rank, (folder,), nprocs=SIZE)
            for name in RUNS:
                train(made(name, folder), folder / name / "from ranks", WHOLE, resume=True)
        finally:
            torch.set_default_dtype(torch.float32)
    return folder


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out):
    kept = checkpoint.read(checkpoint.steps(out / "checkpoints")[-1])
    return kept["recipe"], kept["random"]["torch"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("part", ["from ranks", "to ranks"])
def test_the_numbers_are_those_of_one_process(runs, name, part):
    ours, theirs = (metrics(runs / name / out) for out in (part, "one process"))
    for line, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(line, truth)
    states = [state(runs / name / out) for out in (part, "one process")]
    digests = [recipe.pop("stands_on") for recipe, _ in states]
    assert digests[0] == digests[1]
    torch.testing.assert_close(*states)
    samples = [sorted(os.listdir(runs / name / out / "samples")) for out in (part, "one process")]
    assert samples[0][-1:] == samples[1][-1:]


@pytest.mark.parametrize(
    ("make", "model", "options", "message"),
    [
        (lafite, {}, {}, "3 processes share out whole groups of 4 rows"),
        (lafite, {"logit": "batch"}, {"batch_size": 12, "compile": True}, "logit batch"),
        (vdl, {}, {"batch_size": 12, "label_fraction": 0.5, "supervision_batch": 2},
         "supervision_batch 2 leaves some of 3 processes no row"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(make, model, options, message):
    recipe = make("pictures", "clip", model, **options)
    recipe.ranks = Ranks(0, 3)
    with pytest.raises(ValueError, match=message):
        recipe.build()


def test_groups_and_halves_are_shared_out():
    whole = torch.randn(20, 2, 3, 3)
    shares = [Shares(Ranks(rank, 3), 20, GROUP) for rank in range(3)]
    index, half = torch.arange(20), torch.arange(10)
    assert [len(s.own(index)) for s in shares] == [4, 8, 8]
    assert torch.equal(torch.cat([s.own(index) for s in shares]).sort().values, index)
    assert torch.equal(torch.cat([s.own(half) for s in shares]).sort().values, half)
    for s in shares:
        own = s.own(index)
        assert torch.equal(own[: len(own) // 2], s.own(half))
        assert (s.whole(len(own)), s.whole(len(own) // 2)) == (20, 10)
        torch.testing.assert_close(with_deviation(whole[own]), with_deviation(whole)[own])
    assert sum(s.share for s in shares) == pytest.approx(3)


@pytest.mark.parametrize("batch_size", [8, 14])
def test_batches_that_cannot_be_shared_out(batch_size):
    Shares(Ranks(), batch_size, GROUP)
    message = f"3 processes share out whole groups of 4 rows.*12, not {batch_size}"
    with pytest.raises(ValueError, match=message):
        Shares(Ranks(0, 3), batch_size, GROUP)

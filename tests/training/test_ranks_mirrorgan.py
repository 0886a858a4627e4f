"""MirrorGAN's trainings in two processes against one: numbers, and resuming on either."""

import json

import pytest
import torch
import torch.distributed as dist
from eye import Eye
from small import pictures
from test_ranks import widen

import fastxm.encoders
from fastxm import losses
from fastxm.encoders.damsm import DAMSMConfig
from fastxm.encoders.stem import STEMConfig
from fastxm.models.mirrorgan import GLAMConfig
from fastxm.models.stream import STREAMConfig
from fastxm.training import batches, captions, checkpoint, damsm, gan, mirrorgan, stream
from fastxm.training.damsm import DAMSMRecipe, DAMSMTraining
from fastxm.training.mirrorgan import MirrorGANRecipe, MirrorGANTraining, train_mirrorgan
from fastxm.training.ranks import Ranks, started
from fastxm.training.stream import STREAMRecipe, STREAMTraining
from fastxm.training.trainer import LoopConfig, train

SIZE = 2  # processes: of 5 pictures they have 2 and 3
SHORT, WHOLE = (LoopConfig(steps=steps, log_every=1, checkpoint_every=9) for steps in (2, 4))


def prepare(patch):
    """All in float64, where Adam's first step, a sign, does not hang on rounding."""
    torch.set_default_dtype(torch.float64)
    patch.setattr(fastxm.encoders, "image_encoder", lambda *_, **__: Eye())
    patch.setattr(gan, "STATISTICS", 2)
    # of two concepts: some texts beside a picture's are not wrong
    patch.setattr(mirrorgan, "concepts", lambda dataset: captions.concepts(dataset) % 2)
    patch.setattr(batches, "on_device", widen(batches.on_device))
    for module in (captions, damsm, stream):
        patch.setattr(module, "image_features", widen(module.image_features))


def plain(folder, **options):
    data = str(folder / "pictures")
    return {"data": data, "batch_size": 5, "device": "cpu", "loop": WHOLE, **options}


def of_damsm(folder):
    stem = STEMConfig(words=5, embedding=4, width=6)
    model = DAMSMConfig(stem, region_width=3, image_width=12, image_dropout=0.2)
    options = {"unknown": 0.2, "clip_norm": 0.01, "flip": True, "cache": False}
    return DAMSMRecipe(DAMSMTraining(model=model, **plain(folder, image_size=64), **options))


def of_stream(folder):
    model = STREAMConfig(words=5, embedding=4, hidden=6, image_width=12, dropout=0.2)
    return STREAMRecipe(STREAMTraining(model=model, unknown=0.2, **plain(folder, image_size=64)))


def training(folder, **stages):
    model = GLAMConfig(image_size=64, gf=2, df=2, z_dim=4, cond_dim=4, blocks=1)
    options = {"precision": "fp32", "samples": 3, "augment": "color,translation", "flip": True,
               "ema_statistics": "own", "damsm_weight": 1.0, **stages}  # fmt: skip
    return MirrorGANTraining(model=model, **plain(folder), **options)


def of_mirrorgan(folder):
    done = folder / "one process"
    stages = {name: str(done / name) for name in ("damsm", "stream")}
    return MirrorGANRecipe(training(folder, **stages))


MAKE = {"damsm": of_damsm, "stream": of_stream, "mirrorgan": of_mirrorgan}


def matching(ranks):
    """DAMSM's losses of five pairs, two of a class on other ranks, and their gradients."""
    generator = torch.Generator().manual_seed(6)
    shapes = ((5, 6, 3), (5, 4, 3), (5, 7), (5, 7))
    given = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    regions, words, image, sentence = (ranks.own(t).requires_grad_() for t in given)
    lengths, labels = torch.tensor([4, 1, 3, 2, 4]), torch.tensor([0, 1, 0, 2, 1])
    text = words, ranks.own(lengths)
    options = {"labels": ranks.own(labels), "group": ranks.group}
    values = losses.damsm_loss(regions, *text, image, sentence, **options)
    gradients = torch.autograd.grad(sum(values), (regions, words, image, sentence))
    return [value.detach() for value in values], gradients


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    with started(torch.device("cpu")) as ranks:
        torch.save(matching(ranks), folder / f"{rank}.pt")
    prepare(pytest.MonkeyPatch())
    for name, make in MAKE.items():
        train(make(folder), folder / "ranks" / name, WHOLE)
        train(make(folder), folder / "from ranks" / name, SHORT)
        train(make(folder), folder / "to ranks" / name, WHOLE, resume=True)
    told = []
    run = train_mirrorgan(training(folder), folder / "stages", tell=told.append)
    torch.save((told, run.step), folder / f"stages-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pictures(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTXM_DATA", str(folder / "cache"))
        prepare(patch)
        try:
            for name, make in MAKE.items():
                train(make(folder), folder / "one process" / name, WHOLE)
                train(make(folder), folder / "to ranks" / name, SHORT)
            train(of_damsm(folder), folder / "stages" / "damsm", WHOLE)
            train(of_stream(folder), folder / "stages" / "stream", SHORT)
            torch.multiprocessing.spawn(run_rank, (folder,), nprocs=SIZE)
            for name, make in MAKE.items():
                train(make(folder), folder / "from ranks" / name, WHOLE, resume=True)
        finally:
            torch.set_default_dtype(torch.float32)
    return folder


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([list(line.values()) for line in lines], dtype=torch.float32)


def state(out):
    kept = checkpoint.read(checkpoint.steps(out / "checkpoints")[-1])
    for text in ("frozen", "stands_on"):
        kept["recipe"].pop(text, None)
    return {part: kept[part] for part in ("recipe", "sums")}, kept["random"]["torch"]


def test_damsm_loss_of_all_ranks(runs):
    values, gradients = matching(Ranks())
    found = [torch.load(runs / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]
    for ours, whole in zip(zip(*(part[0] for part in found)), values):
        torch.testing.assert_close(sum(ours) / SIZE, whole)
    for ours, whole in zip(zip(*(part[1] for part in found)), gradients):
        torch.testing.assert_close(torch.cat(ours) / SIZE, whole)


@pytest.mark.parametrize("out", ["ranks", "from ranks", "to ranks"])
@pytest.mark.parametrize("name", MAKE)
def test_the_numbers_are_those_of_one_process(runs, out, name):
    same(runs / out / name, runs / "one process" / name)


def test_stages_are_reused_and_go_on(runs):
    found = [torch.load(runs / f"stages-{rank}.pt", weights_only=True) for rank in range(SIZE)]
    out = runs / "stages"
    told = [f"damsm: {out / 'damsm'} has ended, and is used as it is",
            f"stream: training in {out / 'stream'}"]  # fmt: skip
    assert found == [(told, 4), ([], 4)]
    same(out / "stream", runs / "one process" / "stream")
    torch.testing.assert_close(metrics(out), metrics(runs / "one process" / "mirrorgan"))


def same(ours, theirs):
    torch.testing.assert_close(metrics(ours), metrics(theirs))
    torch.testing.assert_close(state(ours), state(theirs))

"""Trainings of several processes against one: numbers, resuming, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small import Letters, pictures, recipe
from toy import Toy

from fastxm.data import TextFeatures
from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.training import batches, checkpoint, xmcgan
from fastxm.training.dual_encoder import DualEncoderTraining, Pairs, fit
from fastxm.training.ranks import Ranks, buckets, started
from fastxm.training.trainer import LoopConfig, NonFiniteLoss, train

SIZE = 3  # processes: of 4 pictures they have 1, 1 and 2
LOOP = LoopConfig(steps=20, log_every=3, sample_every=10, checkpoint_every=7, keep_checkpoints=2)
SHORT, WHOLE = (LoopConfig(steps=steps, log_every=1, checkpoint_every=9) for steps in (2, 3))
OPTIONS = {
    "augment": "color,translation,cutout",
    "flip": True,
    "ema_statistics": "own",
    "pixel_weight": 5.0,
    "pixel_steps": 1,
}


def widen(f):
    """What f gives, in float64."""

    def wide(*arguments):
        given = f(*arguments)
        if isinstance(given, dict):
            return {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        return given.double() if given.is_floating_point() else given

    return wide


def prepare(patch):
    """XMC-GAN in float64: Adam's first step, a sign, does not hang on rounding there."""
    torch.set_default_dtype(torch.float64)
    patch.setattr(xmcgan, "text_encoder", lambda *_, **__: Letters())
    patch.setattr(batches, "on_device", widen(batches.on_device))
    patch.setattr(TextFeatures, "batch", widen(TextFeatures.batch))


class Spanning(Toy):
    """The toy, with an accident on one rank alone."""

    spans = True

    def __init__(self, rank=-1, **options):
        super().__init__(**options)
        self.at = rank

    def step(self, batch):
        if self.steps_done == 4 and self.ranks.rank == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(batch)


def pairs():
    """Fourteen pairs of five concepts; the last batch of a pass is smaller than the ranks are."""
    generator = torch.Generator().manual_seed(3)
    images, sentences = torch.randn(2, 14, 6, generator=generator)

    class Text:
        def row(self, index, number):
            return torch.from_numpy((index + number) % 14)

        def batch(self, rows):
            return {"sentence": sentences[rows]}

    labels = torch.arange(14) % 5
    return Pairs(images, Text(), np.arange(14), np.full(14, 2), labels, [str(i) for i in range(14)])


def heads(ranks):
    """A dual encoder after three passes."""
    torch.manual_seed(5)
    model = DualEncoder(DualEncoderConfig(image_width=6, text_width=6, hidden=8, width=4))
    fit(model, pairs(), DualEncoderTraining(epochs=3, batch_size=6), False, ranks)
    return model.state_dict()


def made(folder):
    return recipe(folder / "pictures", **OPTIONS)


def refused(toy, out):
    with pytest.raises((NonFiniteLoss, ValueError)) as error:
        train(toy, out, LOOP)
    return str(error.value)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    found = {}
    run = train(Spanning(rank=1), folder / "signalled", LOOP)
    found["signalled"] = run.step, run.interrupted, run.grid is not None
    minutes = None if rank else 1e-9
    run = train(Spanning(), folder / "timed", LoopConfig(steps=9, max_minutes=minutes))
    found["timed"] = run.step, run.interrupted
    found["nan"] = refused(Spanning(nan_at=10 if rank == 2 else -1), folder / "nan")
    found["one"] = refused(Toy(), folder / "one")
    prepare(pytest.MonkeyPatch())
    train(made(folder), folder / "ranks", WHOLE)
    train(made(folder), folder / "from ranks", SHORT)
    train(made(folder), folder / "to ranks", WHOLE, resume=True)
    with started(torch.device("cpu")) as ranks:
        found["heads"] = heads(ranks)
    torch.save(found, folder / f"{rank}.pt")
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
            train(made(folder), folder / "one process", WHOLE)
            train(made(folder), folder / "to ranks", SHORT)
            torch.save(heads(Ranks()), folder / "heads.pt")
            torch.multiprocessing.spawn(run_rank, (folder,), nprocs=SIZE)
            train(made(folder), folder / "from ranks", WHOLE, resume=True)
        finally:
            torch.set_default_dtype(torch.float32)
    return folder


def found(folder, name):
    return [torch.load(folder / f"{rank}.pt", weights_only=True)[name] for rank in range(SIZE)]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    kept = checkpoint.read(checkpoint.steps(folder)[-1])
    kept["recipe"].pop("stands_on")  # texts
    return {part: kept[part] for part in ("recipe", "sums")}, kept["random"]["torch"]


@pytest.mark.parametrize("name", ["ranks", "from ranks", "to ranks"])
def test_the_numbers_are_those_of_one_process(runs, name):
    ours, theirs = (
        [torch.tensor(list(line.values()), dtype=torch.float32) for line in metrics(runs / out)]
        for out in (name, "one process")
    )
    torch.testing.assert_close(ours, theirs)  # the hinge is of float32
    kept = [state(runs / out / "checkpoints") for out in (name, "one process")]
    torch.testing.assert_close(*kept)
    samples = [sorted(os.listdir(runs / out / "samples")) for out in (name, "one process")]
    assert samples[0][-1:] == samples[1]


def test_a_signal_to_one_stops_all(runs):
    assert found(runs, "signalled") == [(5, 2, True), (5, 2, False), (5, 2, False)]
    kept = checkpoint.steps(runs / "signalled" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000005"]


def test_the_clock_of_one_stops_all(runs):
    first, *others = found(runs, "timed")
    assert others == [first, first]
    assert first[0] <= 1


def test_a_loss_of_one_that_is_not_finite_stops_all(runs):
    for message in found(runs, "nan"):
        assert "loss = nan" in message
        assert "step-00000007" in message


def test_a_recipe_of_one_process_is_refused(runs):
    for message in found(runs, "one"):
        assert message == "toy trains in one process: start it without torchrun"
    assert not (runs / "one").exists()


def test_the_dual_encoder(runs):
    truth = torch.load(runs / "heads.pt", weights_only=True)
    for state_of_rank in found(runs, "heads"):
        torch.testing.assert_close(state_of_rank, truth)


def test_rows_are_shared_out():
    whole = torch.arange(14)
    shares = [Ranks(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([r.own(whole) for r in shares]), whole)
    halves = [torch.cat(parts) for parts in zip(*(r.own(whole, 2).chunk(2) for r in shares))]
    assert torch.equal(torch.cat(halves), whole)
    means = [r.share(14) * r.own(whole).double().mean() for r in shares]
    torch.testing.assert_close(sum(means) / 3, whole.double().mean())
    with pytest.raises(ValueError, match="batch_size 2 leaves some of 3 processes no row"):
        shares[0].check(2)


def test_buckets_keep_values_and_memory_order(monkeypatch):
    monkeypatch.setattr("fastxm.training.ranks.BUCKET", 50)
    made = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    made += [torch.randn(3).double(), torch.randn(()), torch.randn(5, 4).T, torch.randn(0)]
    made += [torch.randn(7).expand(3, 7)]
    sizes, views = [], []
    for some, flat, parts in buckets(made):
        sizes.append((len(some), flat.dtype, flat.numel()))
        views += parts
    assert sizes == [(1, torch.float32, 96), (1, torch.float64, 3), (4, torch.float32, 42)]
    assert all(torch.equal(a, b) for a, b in zip(made, views))
    assert [v.stride() for v in views[:4]] == [t.stride() for t in made[:4]]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_torchrun(tmp_path):
    folder, out = pictures(tmp_path / "pictures"), tmp_path / "run"
    script = Path(__file__).with_name("small.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
              f"--master-port={free_port()}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
                   "FASTXM_DATA": str(tmp_path / "cache")}  # fmt: skip
    command = [*launch, str(script), str(folder), str(out), "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(out)] == [2]
    assert (out / "model" / "model.safetensors").exists()
    assert done.stderr.count("images/s") == 1

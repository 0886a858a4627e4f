"""All stages by one command: in order, resumable, and none the wiser for pairs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import pictures
from test_selfsup_recipes import Colours
from torch import nn
from torch.nn import functional as F

from fastxm import CrossModalAutoencoder, cli, encoders
from fastxm.evaluation import selfsup as evaluation
from fastxm.training import (
    checkpoint,
    config,
    image_autoencoder,
    mappers,
    mapping,
    selfsup,
    trainer,
)
from fastxm.training.config import construct
from fastxm.training.stages import Stage, train_stages

LOOP = {"steps": 4, "log_every": 2, "sample_every": 4, "checkpoint_every": 2}
SMALL = {
    "text": {"model": {"words": 6, "word_width": 5, "code": 6}, "loop": LOOP, "batch_size": 8},
    "image": {
        "model": {"image_size": 64, "image_encoder": "colours", "features": 12, "hidden": 6,
                  "code": 4, "z_dim": 3, "gf": 4},
        "loop": LOOP, "df": 2, "batch_size": 4, "precision": "fp32",
    },
    "mapping": {"families": ["mmd", "gan"], "loop": LOOP, "batch_size": 8, "ema_decay": 0.5},
    "device": "cpu", "samples": 4,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTXM_DATA", str(tmp_path_factory.mktemp("cache")))
        for home in (image_autoencoder, encoders):
            patch.setattr(home, "image_encoder", lambda *_, **__: Colours())
        patch.setattr(mappers.MMDGANMapper, "critic_steps", 2)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training that nothing stopped, and its runs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, selfsup.train_selfsup(small(data), out)


@pytest.fixture
def again(whole, tmp_path):
    """A copy of it, to go on with."""
    return Path(shutil.copytree(whole[0], tmp_path / "again"))


def small(folder: Path, **sections) -> selfsup.SelfSupTraining:
    values = {**SMALL, "data": str(folder), **sections}
    return construct(selfsup.SelfSupTraining, values, "small")


def weights(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.name in ("model.safetensors", "metrics.jsonl", "mmd2.json")
    }


def test_all_stages_in_order(data, whole):
    out, runs = whole
    assert [run.out.name for run in runs] == ["text", "image", "mapping-mmd", "mapping-gan"]
    assert all(run.step == 4 and not run.interrupted for run in runs)
    model = CrossModalAutoencoder.from_pretrained(out / "model")
    assert model.config.family == "mmd"
    assert model.text.vocabulary.words
    images = model.generate(["a red picture 3", "blue"], seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert len(model.caption(images)) == 2
    assert (out / "text" / "model" / "reconstructions.txt").read_text().count("\n") > 1
    held_out = json.loads((out / "text" / "held_out.jsonl").read_text().splitlines()[-1])
    assert set(held_out) == {"step", "perplexity", "accuracy"}
    for stage in ("image", "mapping-mmd"):
        assert (out / stage / "samples" / "00000004.png").stat().st_size > 0
    found = json.loads((out / "mapping-gan" / "model" / "mmd2.json").read_text())
    assert set(found["before"]) == set(found["after"]) == {"image_to_text", "text_to_image"}
    assert found["before"] != found["after"]
    assert all(abs(found["floor"][name]) < 0.2 * value for name, value in found["before"].items())
    with pytest.raises(ValueError, match="already holds a run"):
        selfsup.train_selfsup(small(data), out)


@pytest.mark.parametrize("stop", [("text", 3), ("image", 1), ("mapping-mmd", 3)])
def test_stopped_in_any_stage_it_goes_on_to_the_same_weights(
    data, whole, tmp_path, monkeypatch, stop
):
    (stage, at), step = stop, trainer.Loop.step

    def failing(self):
        if self.out.name == stage and self.at.step == at:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Loop, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        selfsup.train_selfsup(small(data), tmp_path)
    monkeypatch.setattr(trainer.Loop, "step", step)
    torch.rand(5)  # whatever else the process drew meanwhile
    selfsup.train_selfsup(small(data), tmp_path, resume=True)
    assert weights(tmp_path) == weights(whole[0])


def test_shuffled_pairs_train_the_same_maps(data, again, tmp_path, monkeypatch):
    shuffled, open_dataset = tmp_path / "shuffled", mapping.open_dataset
    shuffled.mkdir()
    for stage in ("text", "image"):
        (shuffled / stage).symlink_to(again / stage)
    maps = {**SMALL["mapping"], "families": ["mmd", "gan", "mmd_gan"]}
    made = small(data, mapping=maps)
    anchored = small(data, mapping={**maps, "families": ["mmd"], "anchor": "l2"})

    def mixed(*arguments, **options):
        dataset = open_dataset(*arguments, **options)
        order = np.random.default_rng(1).permutation(len(dataset))
        return replace(dataset, captions=[dataset.captions[i] for i in order])

    for out, source in ((again, open_dataset), (shuffled, mixed)):
        monkeypatch.setattr(mapping, "open_dataset", source)
        selfsup.train_selfsup(made, out, resume=True)
        selfsup.train_selfsup(anchored, out, resume=True)
    for family in maps["families"]:
        stage = f"mapping-{family}"
        assert weights(shuffled / stage) == weights(again / stage)
    stage = "mapping-mmd-l2-200"  # an anchor does know pairs
    assert weights(shuffled / stage) != weights(again / stage)


def test_other_families_become_stages_on_the_same_autoencoders(data, again):
    before = weights(again / "mapping-mmd"), weights(again / "image")
    more = {**SMALL["mapping"], "families": ["gan"], "anchor": "info_nce", "anchor_pairs": 5}
    selfsup.train_selfsup(small(data, mapping=more), again, resume=True)
    assert (again / "mapping-gan-info_nce-5" / "model").is_dir()
    assert (weights(again / "mapping-mmd"), weights(again / "image")) == before
    assert CrossModalAutoencoder.from_pretrained(again / "model").config.family == "gan"


def test_maps_do_not_go_on_with_other_autoencoders(data, again):
    longer = {**SMALL["text"], "loop": {**LOOP, "steps": 6}}
    with pytest.raises(ValueError, match="another run: text was"):
        selfsup.train_selfsup(small(data, text=longer), again, resume=True)
    other = {**SMALL["image"], "pixel_weight": 3.0}
    with pytest.raises(ValueError, match=r"another run: pixel_weight was 0\.0, now 3"):
        selfsup.train_selfsup(small(data, image=other), again, resume=True)


def test_a_signal_ends_the_stages(data, tmp_path, monkeypatch):
    made = selfsup.stages(small(data), tmp_path)
    assert [stage.name for stage in made] == ["text", "image", "mapping-mmd", "mapping-gan"]
    monkeypatch.setattr(
        "fastxm.training.stages.train",
        lambda recipe, out, loop, resume: trainer.Run(out, 1, 0.0, None, out, out.name == "b"),
    )
    stages = [Stage(name, lambda: None, trainer.LoopConfig()) for name in "abc"]
    assert [run.out.name for run in train_stages(stages, tmp_path)] == ["a", "b"]


def test_every_preset_is_a_configuration():
    made = {
        name: construct(selfsup.SelfSupTraining, config.preset("selfsup", name), name)
        for name in config.presets("selfsup")
    }
    assert set(made) == {"cpu-demo", "emoji-64", "released-256"}
    demo = made["cpu-demo"]
    minutes = [demo.text.loop.max_minutes, demo.image.loop.max_minutes]
    minutes += [demo.mapping.loop.max_minutes] * len(demo.mapping.families)
    assert sum(minutes) <= 18  # of twenty: features and the stages' beginnings take the rest


def test_an_encoder_that_is_not_there_is_told_before_the_first_stage(data, tmp_path, monkeypatch):
    def absent(source):
        raise ModuleNotFoundError(f"the weights of {source} are not installed")

    monkeypatch.setattr(encoders, "image_encoder", absent)
    with pytest.raises(ModuleNotFoundError, match="weights of colours"):
        selfsup.train_selfsup(small(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "preset", lambda system, name: {**SMALL, "data": str(data)})
    out = tmp_path / "run"
    flags = ["train", "selfsup", "--out", str(out), "--mapping.families", "mmd"]
    assert cli.main([*flags, "--text.loop.steps", "2", "--image.model.gf", "5"]) == 0
    said = capsys.readouterr().out
    assert "text " in said
    assert f"model:  {out / 'model'}" in said
    assert checkpoint.steps(out / "text" / "checkpoints")[-1].name == "step-00000002"
    assert cli.main(flags) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", "selfsup", "--out", str(out), "--resume"]) == 0
    assert cli.main(["sample", "red", "blue", "--model", str(out), "--out", f"{out}/a.png"]) == 0
    assert (out / "a.png").stat().st_size > 0
    assert cli.main(["train", "selfsup", "--out", str(out), "--image.df", "0", "--resume"]) == 2
    assert "df must be at least 1" in capsys.readouterr().err


def test_the_evaluation(data, again, monkeypatch):
    class Judge(nn.Module):
        def features(self, images):
            return [images, F.avg_pool2d(images, 4)]

        def embed(self, images):
            return F.adaptive_avg_pool2d(images, 2).flatten(1)

    monkeypatch.setattr(evaluation, "EfficientNetLite0", Judge)
    monkeypatch.setattr(evaluation, "principal", lambda dataset: np.arange(len(dataset)))
    found = evaluation.evaluate_selfsup(again, str(data), permutations=99)
    drawn = found["pictures drawn again"]
    assert set(drawn) == {
        f"{split}{row}" for split in ("training", "held out") for row in ("", ", another picture")
    }
    assert all(row["perceptual"] >= 0 for row in drawn.values())
    assert set(found["captions said again"]) == {"training", "held out"}
    directions = {f"{f} {d}" for f in ("mmd", "gan") for d in ("to text", "to images")}
    assert set(found["mapped codes"]) == directions
    for row in found["mapped codes"].values():
        assert row["floor"] < row["before"]
        assert row["fall"] == pytest.approx(row["before"] / max(row["after"], 1e-12))
        assert 0.01 <= row["p-value"] <= 1
    (title,) = (title for title in found if title.startswith("retrieval"))
    assert set(found[title]) == {*directions, "chance"}
    (title,) = (title for title in found if title.startswith("captions of"))
    assert set(found[title]) == {"mmd", "gan", "of another picture"}
    (alone,) = evaluation.find_maps(again / "model")
    assert alone == "model"

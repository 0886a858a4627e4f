"""All stages by one command: in order, resumable, and none the wiser for pairs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_selfsup_recipes import Colours

from fastxm import CrossModalAutoencoder, cli
from fastxm.training import checkpoint, config, image_autoencoder, mapping, selfsup, trainer
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
    "mapping": {"families": ["mmd", "gan"], "loop": LOOP, "batch_size": 8},
    "device": "cpu", "samples": 4,
}  # fmt: skip


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(image_autoencoder, "image_encoder", lambda *_, **__: Colours())
    import fastxm.encoders

    monkeypatch.setattr(fastxm.encoders, "image_encoder", lambda *_, **__: Colours())


def small(folder: Path, **sections) -> selfsup.SelfSupTraining:
    values = {**SMALL, "data": str(folder), **sections}
    return construct(selfsup.SelfSupTraining, values, "small")


def weights(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.name in ("model.safetensors", "metrics.jsonl", "mmd2.json")
    }


def test_all_stages_in_order(folder, colours, tmp_path):
    out = tmp_path / "run"
    runs = selfsup.train_selfsup(small(folder), out)
    assert [run.out.name for run in runs] == ["text", "image", "mapping-mmd", "mapping-gan"]
    assert all(run.step == 4 and not run.interrupted for run in runs)
    model = CrossModalAutoencoder.from_pretrained(out / "model")
    assert model.config.family == "mmd"
    assert model.text.vocabulary.words
    images = model.generate(["a red picture 3", "blue"], seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert len(model.caption(images)) == 2
    assert (out / "text" / "model" / "reconstructions.txt").read_text().count("\n") > 1
    for stage in ("image", "mapping-mmd"):
        assert (out / stage / "samples" / "00000004.png").stat().st_size > 0
    found = json.loads((out / "mapping-gan" / "model" / "mmd2.json").read_text())
    assert set(found["before"]) == set(found["after"]) == {"image_to_text", "text_to_image"}
    assert found["before"] != found["after"]
    with pytest.raises(ValueError, match="already holds a run"):
        selfsup.train_selfsup(small(folder), out)


@pytest.mark.parametrize(
    "stop", [("text", 3), ("image", 1), ("mapping-mmd", 3), ("mapping-gan", 0)]
)
def test_stopped_in_any_stage_it_goes_on_to_the_same_weights(
    folder, colours, tmp_path, monkeypatch, stop
):
    selfsup.train_selfsup(small(folder), tmp_path / "whole")
    broken, (stage, at) = tmp_path / "broken", stop
    step = trainer.Loop.step

    def failing(self):
        if self.out.name == stage and self.at.step == at:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Loop, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        selfsup.train_selfsup(small(folder), broken)
    monkeypatch.setattr(trainer.Loop, "step", step)
    torch.rand(5)  # whatever else the process drew meanwhile
    selfsup.train_selfsup(small(folder), broken, resume=True)
    assert weights(broken) == weights(tmp_path / "whole")


def test_shuffled_pairs_train_the_same_maps(folder, colours, tmp_path, monkeypatch):
    whole, shuffled = tmp_path / "whole", tmp_path / "shuffled"
    made = small(folder, mapping={**SMALL["mapping"], "families": ["mmd", "gan", "mmd_gan"]})
    monkeypatch.setattr(mapping.mappers.MMDGANMapper, "critic_steps", 2)
    selfsup.train_selfsup(made, whole)
    open_dataset = mapping.open_dataset

    def mixed(*arguments, **options):
        dataset = open_dataset(*arguments, **options)
        order = np.random.default_rng(1).permutation(len(dataset))
        assert (order != np.arange(len(dataset))).any()
        return replace(dataset, captions=[dataset.captions[i] for i in order])

    monkeypatch.setattr(mapping, "open_dataset", mixed)
    (shuffled / "text").parent.mkdir()
    for stage in ("text", "image"):
        (shuffled / stage).symlink_to(whole / stage)
    selfsup.train_selfsup(made, shuffled, resume=True)
    for family in ("mmd", "gan", "mmd_gan"):
        stage = f"mapping-{family}"
        assert weights(shuffled / stage) == weights(whole / stage)
    anchored = replace(made, mapping=replace(made.mapping, anchor="l2", families=("mmd",)))
    selfsup.train_selfsup(anchored, shuffled, resume=True)
    monkeypatch.setattr(mapping, "open_dataset", open_dataset)
    selfsup.train_selfsup(anchored, whole, resume=True)
    stage = "mapping-mmd-l2-200"
    assert weights(shuffled / stage) != weights(whole / stage)  # an anchor does know pairs


def test_other_families_become_stages_on_the_same_autoencoders(folder, colours, tmp_path):
    out = tmp_path / "run"
    made = small(folder, mapping={**SMALL["mapping"], "families": ["mmd"]})
    selfsup.train_selfsup(made, out)
    before = weights(out / "mapping-mmd"), weights(out / "image")
    more = {**SMALL["mapping"], "families": ["gan"], "anchor": "info_nce", "anchor_pairs": 5}
    selfsup.train_selfsup(small(folder, mapping=more), out, resume=True)
    assert (out / "mapping-gan-info_nce-5" / "model").is_dir()
    assert (weights(out / "mapping-mmd"), weights(out / "image")) == before
    assert CrossModalAutoencoder.from_pretrained(out / "model").config.family == "gan"


def test_maps_do_not_go_on_with_other_autoencoders(folder, colours, tmp_path):
    out = tmp_path / "run"
    selfsup.train_selfsup(small(folder), out)
    longer = {**SMALL["text"], "loop": {**LOOP, "steps": 6}}
    with pytest.raises(ValueError, match="another run: text was"):
        selfsup.train_selfsup(small(folder, text=longer), out, resume=True)
    other = {**SMALL["image"], "pixel_weight": 3.0}
    with pytest.raises(ValueError, match=r"another run: pixel_weight was 0\.0, now 3"):
        selfsup.train_selfsup(small(folder, image=other), out, resume=True)


def test_a_signal_ends_the_stages(folder, colours, tmp_path, monkeypatch):
    made = selfsup.stages(small(folder), tmp_path)
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


def test_the_command(folder, colours, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "preset", lambda system, name: {**SMALL, "data": str(folder)})
    out = tmp_path / "run"
    flags = ["train", "selfsup", "--out", str(out), "--mapping.families", "mmd"]
    assert cli.main([*flags, "--text.loop.steps", "2", "--image.model.gf", "5"]) == 0
    said = capsys.readouterr().out
    assert "text " in said
    assert f"model:  {out / 'model'}" in said
    assert checkpoint.steps(out / "text" / "checkpoints")[-1].name == "step-00000002"
    assert cli.main([*flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", "selfsup", "--out", str(out), "--resume"]) == 0
    assert cli.main(["sample", "red", "blue", "--model", str(out), "--out", f"{out}/a.png"]) == 0
    assert (out / "a.png").stat().st_size > 0
    assert cli.main(["train", "selfsup", "--out", str(out), "--image.df", "0", "--resume"]) == 2
    assert "df must be at least 1" in capsys.readouterr().err

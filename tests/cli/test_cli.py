"""The commands as a user types them: what they leave, what they say, how they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from eye import Eye
from PIL import Image
from rich.console import Console
from tiny_clip import write

import fastxm
from fastxm import cli, doctor
from fastxm.cli import evaluation as evaluation_command
from fastxm.training import config as configs
from fastxm.training.trainer import Loop
from fastxm.training.xmcgan import XMCGANTraining

TINY = ["--gf", "2", "--df", "2", "--z-dim", "4", "--cond-dim", "4", "--image-size", "64",
        "--batch-size", "3", "--precision", "fp32", "--pretrained-weight", "0", "--samples", "2",
        "--device", "cpu", "--log-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("data") / "pictures"
    where.mkdir()
    for i, colour in enumerate(["red", "green", "blue", "white", "black", "pink"]):
        Image.new("RGB", (64, 64), colour).save(where / f"{colour}.png")
        (where / f"{colour}.txt").write_text(f"a {colour} picture, number {i}\n")
    return where


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTXM_DATA", str(folder.parent / "cache"))
        flags = [*TINY, "--steps", "2", "--out", str(out)]
        assert cli.main(["train", "xmcgan", "--data", str(folder), *flags]) == 0
    return out


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(folder.parent / "cache"))


def last_step(run) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def refused(capsys, *arguments: str) -> str:
    """The one line that a refusal says."""
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("fastxm: error: ")
    return said.err


def test_help_needs_no_torch():
    program = (
        "import sys; from fastxm.cli import main; assert main(['--help']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert all(f"\n  {name} " in found.stdout for name in cli.COMMANDS)


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "Draw pictures of captions into one PNG, a row for each caption." in said
    assert "--num-images" in said
    with pytest.raises(SystemExit):
        cli.main(["train", "xmcgan", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("coco-256", "cpu-demo", "emoji-128"))


def test_a_run_can_be_sampled_and_resumed(folder, run, tmp_path, capsys):
    said = yaml.safe_load((run / "config.yaml").read_text())
    assert said["model"]["gf"] == 2
    assert said["data"] == str(folder)
    for k, model in enumerate((run, run / "model")):
        out = tmp_path / f"{k}.png"
        command = ["sample", "a red apple", "a green frog", "--model", str(model)]
        assert cli.main([*command, "--out", str(out), "--num-images", "3"]) == 0
        assert str(out) in capsys.readouterr().out
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert Image.open(tmp_path / "0.png").width == 3 * 136 + 8
    more = ["train", "xmcgan", "--resume", "--out", str(run), "--steps", "4"]
    assert cli.main(more) == 0
    assert "done after 4 steps" in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_evaluate_prints_both_tables(run, tmp_path, monkeypatch, capsys):
    from fastxm import evaluation
    from fastxm.training import dual_encoder

    recall = {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "of": 100}
    distance = {"EffLite0-FD": 173.0, "pictures": 1497, "sources": 346}
    figures = {"distance": {"held-out captions": distance}, "retrieval": {"generated": recall}}
    asked = []
    judge = torch.nn.Linear(1, 1)
    monkeypatch.setattr(dual_encoder, "cached_dual_encoder", lambda c: asked.append(c) or judge)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: asked.append((a, k)) or figures)
    out = tmp_path / "new" / "figures.json"
    flags = ["--model", str(run), "--data", "here", "--num-images", "7", "--out", str(out)]
    assert cli.main(["evaluate", *flags, "--device", "cpu"]) == 0
    (config, ((generator, *rest), options)) = asked
    assert (config.data, config.image_size) == ("here", 64)
    assert generator.config.gf == 2
    assert rest == [judge, "here"]
    assert options == {"num_images": 7, "seed": 0, "options": {"resize": "crop"}}
    said = capsys.readouterr().out
    for text in ("EffLite0-FD", "173.0", "1,497", "346", "among 100", "R@10", "0.750"):
        assert text in said
    report = json.loads(out.read_text())
    of = {"data": "here", "resize": "crop", "num_images": 7, "seed": 0}
    assert report.pop("of") == {"steps": last_step(run), **of}
    on = report.pop("on")
    assert (on["torch"], on["fastxm"], on["GPU"]) == (torch.__version__, fastxm.__version__, None)
    assert on["cores"] >= 1
    assert on["processor"]
    assert report == figures
    shutil.copytree(run / "model", out.parent / "model")
    assert evaluation_command.steps(out.parent) is None
    styles = ["--styles", "twemoji"]
    assert cli.main(["evaluate", "--model", str(run), *styles, "--out", str(out)]) == 0
    assert asked[-1][1]["options"] == {"styles": ("twemoji",)}
    assert json.loads(out.read_text())["of"]["styles"] == ["twemoji"]
    capsys.readouterr()
    assert "which here is not" in refused(capsys, "evaluate", *flags, *styles)
    missing = str(tmp_path / "absent")
    assert "no model in" in refused(capsys, "evaluate", *flags, "--dual-encoder", missing)


def test_a_run_is_judged_by_pictures_made_square_as_its_own(run, folder, tmp_path, monkeypatch):
    from fastxm import evaluation
    from fastxm.data import open_dataset
    from fastxm.training import dual_encoder

    wide = tmp_path / "wide"
    wide.mkdir()
    for i in range(8):
        stripes = Image.new("RGB", (3, 1))
        stripes.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
        stripes.resize((192, 64), Image.Resampling.NEAREST).save(wide / f"{i}.png")
        (wide / f"{i}.txt").write_text(f"number {i}\n")
    asked, greens = [], []

    def judged(model, judge, data, *, num_images, seed, options):
        greens.append(open_dataset(data, 64, progress=False, **options).images[..., 1].mean())
        return {"distance": {}, "retrieval": {}}

    judge = torch.nn.Linear(1, 1)
    monkeypatch.setattr(dual_encoder, "cached_dual_encoder", lambda c: asked.append(c) or judge)
    monkeypatch.setattr(evaluation, "evaluate", judged)
    ours = shutil.copytree(run, tmp_path / "run")
    evaluate = ["evaluate", "--data", str(wide), "--device", "cpu", "--model"]
    for resize, model in (("crop", ours), ("stretch", ours), ("stretch", ours / "model")):
        values = yaml.safe_load((ours / "config.yaml").read_text())
        (ours / "config.yaml").write_text(yaml.safe_dump({**values, "resize": resize}))
        assert cli.main([*evaluate, str(model)]) == 0
    assert cli.main([*evaluate, str(ours), "--resize", "crop"]) == 0
    (ours / "config.yaml").unlink()
    assert cli.main([*evaluate, str(ours)]) == 0
    assert cli.main([*evaluate, str(ours), "--resize", "stretch"]) == 0
    ways = ["crop", "stretch", "stretch", "crop", "crop", "stretch"]
    assert [config.resize for config in asked] == ways
    assert ["crop" if green > 200 else "stretch" for green in greens] == ways
    # the encoder that is trained for it sees them too
    for resize, green in (("crop", 200), ("stretch", 80)):
        config = dual_encoder.DualEncoderTraining(data=str(wide), resize=resize)
        train, _ = dual_encoder.pairs_of(config, False)
        assert green < train.images[..., 1].mean() < green + 56


def test_how_a_run_made_pictures_square_is_read_or_refused(run, tmp_path, capsys):
    ours = shutil.copytree(run, tmp_path / "run")
    (ours / "config.yaml").write_text("{")
    evaluate = ["evaluate", "--model", str(ours), "--device", "cpu"]
    assert "give --resize crop or stretch" in refused(capsys, *evaluate, "--data", "here")
    assert "those of emoji are square" in refused(capsys, *evaluate, "--resize", "crop")


def test_the_dual_encoder_leaves_a_model(folder, tmp_path, capsys):
    out = tmp_path / "dual"
    command = ["train", "dual-encoder", "--data", str(folder), "--out", str(out)]
    assert cli.main([*command, "--epochs", "1", "--hidden", "4", "--width", "4"]) == 0
    assert str(out / "model") in capsys.readouterr().out
    assert fastxm.DualEncoder.from_pretrained(out / "model").config.hidden == 4
    assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 1
    assert "already holds a run" in refused(capsys, *command)


def test_prepare_says_what_there_is(folder, capsys):
    assert cli.main(["prepare", str(folder), "--image-size", "32", "--text-encoder", "none"]) == 0
    assert "pictures of 32 px" in capsys.readouterr().out


def test_doctor_says_what_is_missing_to_the_letter(monkeypatch):
    console = Console(width=200, record=True)
    monkeypatch.setattr(doctor, "EXTRAS", {"no-such-package": ("[it]", "pip install 'no[such]'")})
    doctor.report(console)
    row = next(r for r in console.export_text().splitlines() if "no-such-package" in r)
    assert "[it]" in row
    assert "pip install 'no[such]'" in row


def test_doctor_names_every_op(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    facts = ("nvcc", "precision auto", torch.__version__)
    for name in ("info_nce", "region_word", "mmd2", "modulation", *facts):
        assert name in said


def test_refusals_are_one_line(folder, run, tmp_path, capsys):
    train = ["train", "xmcgan", "--data", str(folder), *TINY]
    assert "no command 'trian'" in refused(capsys, "trian")
    assert "no system 'gan'" in refused(capsys, "train", "gan")
    assert "cpu-demo, emoji-128" in refused(capsys, "train", "xmcgan", "--preset", "tiny")
    assert "already holds a run" in refused(capsys, *train, "--out", str(run))
    missing = str(tmp_path / "absent")
    assert "no run to resume" in refused(capsys, "train", "xmcgan", "--resume", "--out", missing)
    other = [*train, "--out", str(run), "--resume", "--gf", "4"]
    assert "model.gf was 2, now 4" in refused(capsys, *other)
    assert "not " in refused(capsys, *train, "--data", missing, "--out", missing)
    assert "no model in" in refused(capsys, "sample", "a dog", "--model", missing)
    assert "one caption" in refused(capsys, "sample", "--model", str(run))
    assert "none that is empty" in refused(capsys, "sample", "a dog", " ", "--model", str(run))
    jpeg = ["sample", "a dog", "--model", str(run), "--out", missing + ".jpg"]
    assert "writes a PNG" in refused(capsys, *jpeg)
    assert "image_size is one of" in refused(capsys, *train, "--image-size", "65", "--out", missing)
    assert "--preset" in refused(capsys, *train, "--preset")
    assert "Unrecognized options: --gff" in refused(capsys, *train, "--gff", "3")
    assert "Error parsing --gf" in refused(capsys, *train, "--gf", "x")
    assert "Missing from fastxm sample: --model" in refused(capsys, "sample", "a dog")
    assert "steps must be at least 1" in refused(capsys, *train, "--steps", "0")
    assert not (tmp_path / "absent").exists()


def test_faults_of_the_program_are_not_hidden(monkeypatch, run):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["sample", "a dog", "--model", str(run)])


def test_traceback_on_demand(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model in"):
        cli.main(["sample", "a dog", "--model", str(tmp_path), "--traceback"])


def test_bench_runs_a_script_and_returns_its_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "bench_op.py"
    script.write_text("import sys; sys.exit(3 if sys.argv[1:] == ['--quick'] else 0)")
    monkeypatch.setattr(cli.fastxm, "__file__", str(tmp_path / "fastxm" / "__init__.py"))
    assert cli.main(["bench", "op"]) == 0
    assert cli.main(["bench", "op", "--quick"]) == 3
    assert cli.main(["bench"]) == 0
    assert "no benchmark 'po': there are op" in refused(capsys, "bench", "op", "po")
    other = tmp_path / "benchmarks" / "bench_other.py"
    other.write_text("import sys; sys.exit(5)")
    assert cli.main(["bench", "op", "other"]) == 5
    assert cli.main(["bench", "op"]) == 0
    script.unlink()
    other.unlink()
    assert "come with a checkout" in refused(capsys, "bench")


def test_demo_is_prepare_train_sample_and_goes_on(tmp_path, monkeypatch, capsys):
    called, run = [], SimpleNamespace(step=1000, interrupted=0)

    def call(name, *flags):
        called.append((name, *flags))
        return run

    for name in ("prepare", "train_system", "sample"):
        monkeypatch.setattr(cli, name, partial(call, name))
    assert cli.main(["demo", "--out", str(tmp_path), "--minutes", "2"]) == 0
    assert [name for name, *_ in called] == ["prepare", "train_system", "sample"]
    assert called[1][1] == "xmcgan"
    train = called[1][2]
    assert train == ["--preset", "cpu-demo", "--out", str(tmp_path), "--max-minutes", "2.0"]
    assert "before step 1000 pictures are blurs" in capsys.readouterr().out
    (tmp_path / "config.yaml").touch()
    run.step = 2000
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert "blurs" not in capsys.readouterr().out
    assert called[4][2][-1] == "--resume"
    run.interrupted = signal.SIGINT
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert [name for name, *_ in called[6:]] == ["prepare", "train_system"]


def test_a_signal_shows_in_the_exit_code(folder, tmp_path, monkeypatch, capsys):
    step = Loop.step

    def ended(loop):
        step(loop)
        os.kill(os.getpid(), signal.SIGTERM)

    out = str(tmp_path / "run")
    begin = ["train", "xmcgan", "--data", str(folder), *TINY, "--steps", "2", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", ended)
        assert cli.main(begin) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "interrupted after 1 steps" in said
    assert f"go on with: fastxm train xmcgan --resume --out {out}" in said
    assert cli.main(["train", "xmcgan", "--resume", "--out", out]) == 0


def test_every_preset_is_a_configuration():
    made = {
        name: configs.construct(XMCGANTraining, configs.preset("xmcgan", name), name)
        for name in configs.presets("xmcgan")
    }
    assert set(made) == {"cpu-demo", "emoji-64", "emoji-128", "coco-256"}
    assert {name: config.model.image_size for name, config in made.items()} == {
        "cpu-demo": 64,
        "emoji-64": 64,
        "emoji-128": 128,
        "coco-256": 256,
    }
    for name, config in made.items():
        assert bool(config.augment) == (config.data == "emoji"), name
    assert made["cpu-demo"].loop.max_minutes <= 15


def test_mirrorgan_trains_its_stages_and_reuses_them(folder, tmp_path, capsys, monkeypatch):
    import fastxm.encoders

    monkeypatch.setattr(fastxm.encoders, "image_encoder", lambda *_, **__: Eye())
    stages = {
        "damsm": {"model": {"region_width": 3, "image_width": 12, "stem": {"width": 4}}},
        "stream": {"model": {"image_width": 12, "hidden": 4, "embedding": 4}},
    }
    preset = configs.preset

    def small(system, name):
        loop = {"steps": 1, "log_every": 1}
        if system not in stages:
            return preset(system, name)
        return {"data": "emoji", "batch_size": 3, "loop": loop, **stages[system]}

    monkeypatch.setattr(configs, "preset", small)
    out = tmp_path / "mirror"
    flags = ["--data", str(folder), "--out", str(out), "--gf", "2", "--df", "2", "--log-every",
             "1", "--batch-size", "3", "--samples", "2", "--device", "cpu"]  # fmt: skip
    command = ["train", "mirrorgan", *flags, "--stream-weight", "0", "--damsm-weight", "0"]
    assert cli.main([*command, "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "damsm: training in" in said
    assert "done after 1 steps" in said
    assert fastxm.MirrorGAN.from_pretrained(out / "model").config.glam.gf == 2
    weights = (out / "damsm/model/model.safetensors").stat().st_mtime_ns
    assert "already holds a run" in refused(capsys, *command, "--steps", "2")
    assert cli.main(["train", "mirrorgan", "--resume", "--out", str(out), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("has ended, and is used as it is") == 2
    assert "done after 2 steps" in said
    assert (out / "damsm/model/model.safetensors").stat().st_mtime_ns == weights
    # another run takes the stages of this one
    other = ["--out", str(tmp_path / "other"), "--damsm", str(out / "damsm")]
    again = [*command, *other, "--stream", str(out / "stream"), "--steps", "1"]
    assert cli.main(again) == 0
    assert "training in" not in capsys.readouterr().out
    assert not (tmp_path / "other" / "damsm").exists()
    missing = [*command, "--out", str(tmp_path / "third"), "--damsm", str(tmp_path / "absent")]
    assert "no model in" in refused(capsys, *missing, "--stream", str(out / "stream"))
    assert not (tmp_path / "third").exists()
    png = tmp_path / "grid.png"
    assert cli.main(["sample", "a red picture", "--model", str(out), "--out", str(png)]) == 0
    assert str(png) in capsys.readouterr().out
    assert "draws nothing" in refused(capsys, "sample", "a", "--model", str(out / "damsm"))


def test_every_preset_of_mirrorgan_and_its_stages_is_a_configuration():
    from fastxm.cli.training import SYSTEMS, classes

    for system in ("mirrorgan", "damsm", "stream"):
        assert configs.presets(system) == ["birds", "coco", "cpu-demo"]
        for name in configs.presets(system):
            made = configs.construct(classes(system)[1], configs.preset(system, name), name)
            assert system not in ("mirrorgan",) or made.stages == name
        assert SYSTEMS[system][2] in configs.presets(system)


@pytest.mark.parametrize("system", ["lafite", "vdl"])
def test_vdl_is_trained_and_sampled_or_refused_in_one_line(system, folder, tmp_path, capsys):
    from fastxm.cli.training import classes

    for name in configs.presets(system):
        made = configs.construct(classes(system)[1], configs.preset(system, name), name)
        assert name == "coco-256" or made.loop.max_minutes <= 20
    clip = write(tmp_path / "clip")
    out = tmp_path / "run"
    widths = ["--evidence-width", "8"] if system == "vdl" else []
    tiny = ["--image-size", "16", "--embedding", "6", "--z-dim", "4", "--w-dim", "4", "--hidden",
            "8", "--channel-base", "64", "--channel-max", "4", "--batch-size", "2", "--samples",
            "2", "--device", "cpu", "--log-every", "1", *widths]  # fmt: skip
    command = ["train", system, "--data", str(folder), "--out", str(out), *tiny]
    assert (
        cli.main([*command, "--encoder", str(clip), "--label_fraction", "0", "--steps", "2"]) == 0
    )
    picture = tmp_path / "grid.png"
    assert cli.main(["sample", "a red", "--model", str(out), "--out", str(picture)]) == 0
    assert Image.open(picture).height > 0
    capsys.readouterr()
    other = [*command[:4], "--out", str(tmp_path / "absent"), *tiny]
    assert "label_fraction is in [0, 1], not 2" in refused(capsys, *other, "--label-fraction", "2")
    (clip / "model.safetensors").unlink()
    assert cli.main([*other, "--encoder", str(clip)]) == 2
    assert "has no weights: no model.safetensors" in capsys.readouterr().err

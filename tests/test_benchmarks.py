"""The benchmarks run, at tiny shapes: providers agree, absent ones say so, files are written."""

import copy
import dataclasses
import importlib
import json
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastxm.encoders.frozen import FrozenImages

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "training"))
    # the interpreter is no backend to time
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("op", ["info_nce", "region_word", "mmd", "modulation"])
def test_op(op, device, tmp_path):
    script = importlib.import_module(f"bench_{op}")
    argv = ["--quick", "--device", device, "--out", str(tmp_path), "--providers"]
    rows = script.run([*argv, "eager", "fastxm", "memeff"])
    written = json.loads((tmp_path / f"{op}.json").read_text())
    assert len(written["rows"]) == len(rows)
    assert {"chip", "torch", "commit"} <= set(written)
    by_name = {row["provider"]: row for row in written["rows"]}
    assert [row for row in rows if "error" in row] == []
    # two correct ways of a float32 function differ by rounding only
    for name in ("fastxm", "fastxm reference"):
        assert by_name[name]["difference"] < 1e-4
        assert by_name[name]["forward_ms"] > 0
        assert by_name[name]["forward_backward_of_limit"] > 0
    if op in ("info_nce", "region_word"):
        assert by_name["fastxm"]["float64_error"] < 1e-4
        assert "computes" not in by_name["fastxm"]


def test_providers_compute_what_they_say(capsys):
    """Peers too, where they are installed, and the formulas of those that compute another loss."""
    common, script = (importlib.import_module(name) for name in ("common", "bench_info_nce"))
    case = script.case({"N": 40, "D": 64, "dtype": "float32"}, torch.float32, "cpu")
    case.providers["a wrong one"] = lambda x, y, scale: 1.01 * script.eager(x, y, scale)
    case.providers["known"] = lambda x, y, scale: script.sigmoid(x, y, scale)
    case.other["known"] = ("the sigmoid loss", script.sigmoid)
    del case.providers["compiled"]
    errors = common.float64_errors(case)
    wrong = errors.pop("a wrong one")
    assert wrong > 1e-3
    assert {"eager", "fastxm", "fastxm recomputed", "open_clip", "chunked checkpoint"} < set(errors)
    assert {name for name, error in errors.items() if not error < 1e-5} == set()
    args = common.parser("").parse_args(["--quick", "--device", "cpu", "--seconds", "0"])
    rows = common.measure(case, torch.float32, args, errors | {"a wrong one": wrong})
    told = {row["provider"]: row.get("computes") for row in rows}
    assert told["eager"] is None
    assert told["known"] == "the sigmoid loss"
    assert told["a wrong one"].startswith("NOT THE SAME")


def test_what_a_machine_does_not_hold_or_takes_too_long_is_not_run(monkeypatch):
    script = importlib.import_module("bench_info_nce")
    assert script.too_much("eager", 1 << 20, "cpu").endswith("more than half of the memory")
    assert script.too_much("eager", 64, "cpu") is None
    assert script.too_much("fastxm", 1 << 20, "cpu") is None
    assert "beyond N = 8192" in script.too_long("eager", 8193, "cpu")
    assert script.too_long("eager", 8192, "cpu") is None


def test_slow_peers_of_mmd_have_a_limit(capsys):
    script = importlib.import_module("bench_mmd")
    for name in ("geomloss online", "pykeops"):
        assert sum(script.too_long(name, s["N"], s["D"], "cpu") is None
                   for s in script.SHAPES["cpu"]) >= 2  # fmt: skip
        assert "to keep the run short" in script.too_long(name, 2048, 256, "cpu")
        assert script.too_long(name, 2048, 256, "cuda") is None
    assert script.too_long("compiled", 1 << 20, 256, "cpu") is None
    script.run(["--quick", "--device", "cpu", "--providers", "eager"])
    assert "nothing written" in capsys.readouterr().err


def test_memory_of_info_nce_grows_with_n_d():
    """The bound of the page, where the products of all pairs would not fit under it."""
    memory = importlib.import_module("memory")
    if memory.peak_memory(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell the high-water mark")
    n, d = 6144, 64
    shape = {"N": n, "D": d, "dtype": "float32"}
    row = memory.peak_alone("info_nce", "fastxm", shape, "cpu")
    bound = 64 + 4 * n * d * 4 / 1e6
    assert bound < n * n * 4 / 1e6 / 2
    assert 2 * n * d * 4 / 1e6 < row["peak_mb"] < bound, row
    assert (
        "half of the memory"
        in memory.peak_alone("info_nce", "eager", shape | {"N": 1 << 18, "D": 1}, "cpu")["skipped"]
    )


def test_page_has_its_tables_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    page, sizes = importlib.import_module("page"), {"N": 8, "D": 4, "dtype": "float32"}
    measured = {"forward_backward_ms": 20.0, "forward_backward_of_limit": 0.5, "peak_mb": 3.0}
    rows = [
        {**sizes, "provider": "limit"},
        {**sizes, "provider": "fastxm", **measured, "float64_error": 1e-7},
        {**sizes, "provider": "quick", **measured, "forward_backward_ms": 5.0, "computes": "less"},
    ]
    alone = [{**sizes, "N": 16, "provider": "fastxm", "peak_mb": 4.0}]
    kernel = {"kernel": "op._it_kernel", "registers": 9, "spills": 0, "shared": 64}
    result = {"op": "info_nce", "chip": "a chip", "threads": 1, "torch": "2", "commit": "abc",
              "rows": rows, "memory": alone, "kernels": [{**kernel, "arch": "sm_90a"}]}  # fmt: skip
    for op in ("info_nce", "region_word"):
        (tmp_path / f"{op}.json").write_text(json.dumps(result))
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):  # a second time replaces what the first one wrote
        page.main([str(tmp_path), "--page", str(text)])
    found = text.read_text()
    assert found.startswith("before\n")
    assert found.endswith("after\n")
    assert "old" not in found
    assert found.count("| fastxm | **20 (2.00)** | 1e-07 |") == 2
    assert "| fastxm | 3 | 4 |" in found
    assert "quick computes less." in found
    assert "| Triton `it_kernel`, sm_90a | 1 | 9 | 0 | 64 |" in found
    assert text.with_suffix(".png").stat().st_size > 10_000
    page.main([str(tmp_path), str(tmp_path), "--page", str(text)])  # of two machines
    found = text.read_text()
    assert found.count("On a chip, 1 threads") == 2
    assert found.index("`it_kernel`") < found.index("<details>") < found.index("</details>")
    assert found.count("`it_kernel`, sm_90a") == 2  # of both ops, of the first machine
    assert found.endswith("after\n")
    assert (ROOT / "docs/contrastive.md").read_text().count(page.MARKS[0]) == 1


def test_failure_is_a_row(monkeypatch, tmp_path, capsys):
    script = importlib.import_module("bench_modulation")

    def broken(*_):
        raise ValueError("told to fail")

    monkeypatch.setattr(script, "eager", broken)
    rows = script.run(["--quick", "--device", "cpu", "--providers", "eager", "fastxm reference"])
    assert rows[1]["error"] == "ValueError: told to fail"
    assert all("error" not in row for row in rows[2:])
    assert "eager: FAILED: ValueError: told to fail" in capsys.readouterr().out


def test_peak_memory_sees_what_a_call_allocates():
    memory = importlib.import_module("memory")

    def call():
        first = torch.ones(5_000_000)  # 20 MB
        second = first + 1
        return second

    call()
    found = memory.peak_memory(call, "cpu")
    if found is None:
        pytest.skip("this system does not tell the high-water mark")
    assert found == pytest.approx(40, abs=4)


def test_shapes_on_the_command_line():
    common = importlib.import_module("common")
    default = {"N": 4, "D": 8, "dtype": "float32"}
    assert common.parse_shape("N=16,dtype=bfloat16", default) == default | {
        "N": 16,
        "dtype": "bfloat16",
    }
    with pytest.raises(SystemExit, match="a shape has N, D, dtype, not M"):
        common.parse_shape("M=3", default)


def test_plain_model_is_the_model():
    from fastxm.models.xmcgan import XMCGAN, XMCGANConfig

    plain = importlib.import_module("plain_model").plain
    config = XMCGANConfig(image_size=64, gf=2, df=2, text_width=8, words=5)
    ours = XMCGAN(config).double().train()
    theirs = copy.deepcopy(ours)
    plain(theirs)
    z, words, lengths = torch.randn(3, 128), torch.randn(3, 5, 8), torch.tensor([2, 5, 3])
    z, words = z.double(), words.double()
    sentence = words.mean(1)
    images = [m.generator(z, words, sentence, lengths) for m in (ours, theirs)]
    torch.testing.assert_close(*images)
    pairs = zip(*(m.discriminator(images[0], sentence) for m in (ours, theirs)))
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
    grads = [
        torch.autograd.grad(image.square().sum(), list(m.generator.parameters()))
        for image, m in zip(images, (ours, theirs))
    ]
    for found, wanted in zip(*grads):
        torch.testing.assert_close(found, wanted)


def test_training_step(device, tmp_path):
    script = importlib.import_module("bench_training")
    eager = {"plain", "fastxm fp32"}
    kept = {name: script.VARIANTS[name] for name in script.VARIANTS if name in eager}
    bench = dataclasses.replace(script.XMC, variants=kept)
    flags = ["--quick", "--device", device, "--out", str(tmp_path)]
    limit, plain, ours = script.run(flags, bench)
    assert "error" not in plain | ours
    assert limit["step_flops"] > 0
    assert ours["images_per_s"] > 0
    assert plain["losses"].keys() == ours["losses"].keys()
    assert json.loads((tmp_path / "training.json").read_text())["rows"][1]["provider"] == "plain"


def test_mirrorgan_step(device, tmp_path):
    script = importlib.import_module("bench_mirrorgan")
    bench = dataclasses.replace(script.MIRROR, variants=["plain", "fastxm fp32"])
    flags = ["--quick", "--device", device, "--out", str(tmp_path)]
    _, plain, ours = script.run(flags, bench)
    assert "error" not in plain | ours
    # the first losses of both, before any update, are of the same weights
    for name, loss in plain["losses"].items():
        assert loss == pytest.approx(ours["losses"][name], rel=2e-3), name
    assert json.loads((tmp_path / "mirrorgan.json").read_text())["rows"][1]["provider"] == "plain"


def test_profile_takes_the_worst_shape(tmp_path, capsys):
    bench = importlib.import_module("bench_modulation")
    bench.run(["--quick", "--device", "cpu", "--out", str(tmp_path), "--providers", "fastxm"])
    importlib.import_module("profile_op").main([str(tmp_path)])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["op"] == "modulation"
    assert found["kernels"][0]["us"] > 0
    assert "of the limit" in capsys.readouterr().out


def test_gpu_without_a_gpu(monkeypatch, capsys, tmp_path):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_gpu_stages_end_in_a_summary(monkeypatch, tmp_path, capsys):
    gpu = importlib.import_module("gpu")

    def stage(name, code, limit=60):
        return gpu.Stage(name, lambda: [sys.executable, "-c", code], limit, {})

    made = [
        stage("good", "print('fine')"),
        stage("bad", "raise SystemExit(3)"),
        stage("endless", "import time; time.sleep(600)", limit=2),
        gpu.Stage("absent", lambda: "no such tool", 60, {}),
    ]
    monkeypatch.setattr(gpu, "stages", lambda *_: made)
    monkeypatch.setattr(gpu, "gpu", lambda: "a GPU")
    packed, tmp_path = tmp_path / "packed", tmp_path / "results"
    options = ["--minutes", "1", "--out", str(tmp_path), "--archive", str(packed)]
    assert gpu.main(options) == 1
    found = json.loads((tmp_path / "summary.json").read_text())["stages"]
    with tarfile.open(f"{packed}.tar.gz") as archive:
        assert {"./summary.json", "./stage_absent.json"} <= set(archive.getnames())
    assert [r["status"] for r in found] == ["ok", "failed", "timed out", "skipped"]
    assert found[0]["output"] == "fine\n"
    assert json.loads((tmp_path / "stage_bad.json").read_text())["returncode"] == 3
    assert "| endless    | timed out |" in capsys.readouterr().out


def test_gpu_shares_its_time():
    gpu = importlib.import_module("gpu")
    stages = [gpu.Stage(str(limit), lambda: "", limit, {}) for limit in (100, 300)]
    assert gpu.share(stages, 1000) == 100  # its limit
    assert gpu.share(stages, 40) == 20  # twice its share
    assert gpu.share(stages[1:], 40) == 40  # all that is left


def test_synthetic_data(tmp_path):
    synthetic = importlib.import_module("synthetic")
    lines = (synthetic.pictures(tmp_path) / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 512
    assert all((tmp_path / json.loads(line)["file_name"]).is_file() for line in lines)


def test_vdl_table(tmp_path, monkeypatch, capsys):
    from small import pictures
    from tiny_clip import write

    from fastxm.training.checkpoint import steps

    table = importlib.import_module("vdl_table")
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    model = {"image_size": 16, "embedding": 6, "z_dim": 4, "w_dim": 4, "mapping_layers": 1,
             "channel_base": 64, "channel_max": 4, "hidden": 8}  # fmt: skip
    values = {"batch_size": 4, "samples": 2, "device": "cpu", "data": str(pictures(tmp_path / "p")),
              "encoder": str(write(tmp_path / "clip"))}  # fmt: skip

    def preset(system, _):
        more = {"evidence_width": 8} if system == "vdl" else {}
        return {**values, "model": {**model, **more}}

    found = {"held-out captions": {"EffLite0-FD": 12.5}}, {"generated": {"R@10": 0.25}}
    asked = []
    monkeypatch.setattr(table.configs, "preset", preset)
    monkeypatch.setattr(table, "judged", lambda model, *_: asked.append(model) or found)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a red picture\nblue\n")
    flags = ["--out", str(tmp_path / "t"), "--steps", "5", "--corpus", str(corpus)]
    whole = table.train

    def cut(recipe, out, loop, **options):
        whole(recipe, out, dataclasses.replace(loop, steps=2), **options)
        raise SystemExit

    monkeypatch.setattr(table, "train", cut)
    with pytest.raises(SystemExit):
        table.main(flags)
    monkeypatch.setattr(table, "train", whole)  # and goes on where it was stopped
    table.main(flags)
    assert len(asked) == len(table.VARIANTS) == 11
    rows = {name: json.loads((tmp_path / "t" / f"{name}.json").read_text())
            for name in table.VARIANTS}  # fmt: skip
    for name, row in rows.items():
        assert (tmp_path / "t" / f"{name}.png").is_file()
        assert row["steps"] == 5
        assert row["EffLite0-FD"] == 12.5
        assert -1 <= row["cos(sampled, true)"] <= 1
        assert (row["KL"] != 0) == name.startswith("vdl")
        assert row["KL"] >= 0
    assert "vdl-without-evidence" in capsys.readouterr().out
    kept = {"lafite-fixed": [2, 3], "lafite-corpus": [3]}  # the one was cut at 2
    for name, numbers in kept.items():
        shared = [path.name for path in steps(tmp_path / f"t/stage-1-{name}/checkpoints")]
        assert shared == [f"step-{number:08d}" for number in numbers]
    assert rows["lafite-corpus"]["cos(sampled, true)"] != rows["lafite-fixed"]["cos(sampled, true)"]
    for name in ("vdl-gaussian", "vdl-vmf", "vdl-without-evidence", "vdl-corpus"):
        last = f"step-{5 + table.ALONE:08d}"  # as many of an adversary as the other rows
        assert steps(tmp_path / "t" / name / "checkpoints")[-1].name == last
    table.main(flags)
    assert len(asked) == 11  # rows that are done are read


class Channels(FrozenImages):
    """An encoder of pictures: the means of their channels."""

    name, width, image_size = "channels", 3, None

    def __init__(self):
        super().__init__()
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(())))

    def features(self, images):
        return [images]

    def pool(self, features):
        return features[-1].mean((2, 3))

    def classes(self, pooled):
        raise NotImplementedError


def test_second_judge(tmp_path, monkeypatch, capsys):
    judge = importlib.import_module("second_judge")
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(60):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}\n")

    def load(run, device):
        def generate(captions, *, seed):
            noise = torch.rand(len(captions), 3, 8, 8)
            return noise if run.name == "noise" else torch.zeros_like(noise)

        return types.SimpleNamespace(image_size=8, generate=generate)

    monkeypatch.setattr(judge, "load", load)
    monkeypatch.setattr(judge, "resize_of", lambda run: "crop")
    monkeypatch.setattr(judge, "EfficientNetLite2", Channels)
    runs = [str(tmp_path / name) for name in ("noise", "black")]
    judge.main([*runs, "--data", str(folder), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["EffLite2-FD"]
    assert set(found) == {"noise", "black", "real held-out pictures"}
    spread = 3 / 12 / 64  # of a picture's three means
    assert found["noise"] < spread  # of the same law as the real ones
    # black's own means are 0; those of 20 pictures or more are known to five standard errors
    assert found["black"] == pytest.approx(3 * 0.5**2 + spread, abs=5 * (spread / 20) ** 0.5)
    assert "black: 0." in capsys.readouterr().out

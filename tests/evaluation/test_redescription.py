"""R-precision and redescription on tiny pictures: what a perfect and a blind generator get."""

import pytest
import torch
from eye import Eye
from PIL import Image

import fastxm.evaluation.redescription as judged
from fastxm.encoders.damsm import DAMSMConfig
from fastxm.encoders.stem import STEMConfig
from fastxm.evaluation import evaluate_redescription
from fastxm.models.mirrorgan import GLAMConfig, MirrorGAN, MirrorGANConfig
from fastxm.models.stream import STREAMConfig

WORDS = tuple(f"n{i}" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("greys")
    for i in range(60):
        Image.new("RGB", (64, 64), (4 * i, 255 - 4 * i, i)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"n{i}\n")
    return root


def model(monkeypatch) -> MirrorGAN:
    monkeypatch.setattr(judged, "image_encoder", Eye)
    torch.manual_seed(0)
    config = MirrorGANConfig(
        GLAMConfig(image_size=64, gf=2, df=2, z_dim=4, cond_dim=4, blocks=1),
        DAMSMConfig(
            STEMConfig(WORDS, words=2, embedding=4, width=12), region_width=3, image_width=12
        ),
        STREAMConfig(WORDS, words=2, embedding=4, hidden=6, image_width=12),
    )
    made = MirrorGAN(config).eval()
    for part in (made.damsm, made.stream):
        part._encoders["image"] = Eye()
    return made


def test_real_pictures_and_a_generator_that_draws_them(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path))
    made = model(monkeypatch)
    pictures = {}
    for i in range(60):
        colour = torch.tensor([4 * i, 255 - 4 * i, i])[:, None, None] / 255
        pictures[f"n{i}"] = colour.expand(3, 64, 64)
    monkeypatch.setattr(
        made, "generate", lambda captions: torch.stack([pictures[c] for c in captions])
    )
    # judges that know the truth: the number of a caption is the red of its picture
    monkeypatch.setattr(made.damsm, "embed_images", lambda x: circle(x[:, 0, 0, 0] * 255 / 4))
    monkeypatch.setattr(
        made.damsm, "embed_text", lambda texts: circle(torch.tensor([float(t[1:]) for t in texts]))
    )
    monkeypatch.setattr(
        made, "caption", lambda x, **_: [f"n{round(v.item() * 255 / 4)}" for v in x[:, 0, 0, 0]]
    )
    state = torch.random.get_rng_state()
    found = evaluate_redescription(made, str(folder), num_images=20, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    precision, told = found["R-precision"], found["redescription"]
    of = precision["chance"]["of"]
    assert precision["generated"] == precision["real"]
    assert precision["generated"]["R@1"] == 1
    assert precision["chance"]["R@1"] == pytest.approx(1 / of)
    assert told["generated"] == told["real"]
    assert told["generated"]["BLEU-1"] == 1
    assert told["generated, shuffled"]["BLEU-1"] == 0
    assert told["generated"]["perplexity"] > 0
    assert found["score"]["generated"] == found["score"]["real"]


def test_real_pictures_are_made_square_as_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path))
    seen = []

    class Opened(Exception):
        pass

    def opened(data, size, split, **options):
        seen.append(options)
        raise Opened

    monkeypatch.setattr(judged, "open_dataset", opened)
    with pytest.raises(Opened):
        evaluate_redescription(model(monkeypatch), str(folder), options={"resize": "stretch"})
    assert seen[0]["resize"] == "stretch"


def circle(number):
    return torch.stack([torch.sin(number / 10), torch.cos(number / 10)], 1)


def test_a_blind_generator_finds_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path))
    made = model(monkeypatch)
    monkeypatch.setattr(made, "generate", lambda captions: torch.zeros(len(captions), 3, 64, 64))
    found = evaluate_redescription(made, str(folder), num_images=7, progress=False)
    assert found["R-precision"]["generated"]["R@1"] <= found["R-precision"]["chance"]["R@1"]


def test_it_needs_two_concepts(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    (tmp_path / "p").mkdir()
    for i in (1, 2):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "p" / f"{i}.png")
        (tmp_path / "p" / f"{i}.txt").write_text("n1\n")
    with pytest.raises(ValueError, match="holds no two concepts out"):
        evaluate_redescription(model(monkeypatch), str(tmp_path / "p"), progress=False)

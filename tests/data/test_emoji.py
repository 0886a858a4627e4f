"""Claim: the default set is what its packages hold, captioned, split and weighted as stated."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastxm.data import emoji, open_dataset
from fastxm.data.pictures import rendered


@pytest.fixture(scope="module")
def source():
    return emoji.source()


@pytest.fixture(scope="module")
def by_id(source):
    return {picture.id: picture for picture in source.pictures}


def test_every_concept_in_both_styles(source, by_id):
    assert len(source.pictures) == len(by_id) == 2 * (3979 - 9)  # without 9 components
    styles = {style: {p.id.split("/")[1] for p in source.pictures if p.id.startswith(style)}
              for style in ("openmoji", "twemoji")}  # fmt: skip
    assert styles["openmoji"] == styles["twemoji"]
    assert all(Path(picture.path).is_file() for picture in source.pictures)


def test_packages_of_drawings_are_not_imported(tmp_path, monkeypatch):
    # one of them asks for a newer Python than its drawings do
    (tmp_path / "drawings" / "svg").mkdir(parents=True)
    (tmp_path / "drawings" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "drawings" / "svg" / "1f34e.svg").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(emoji.STYLES, "ours", ("drawings", "svg"))
    assert list(emoji.drawings_of("ours")) == ["1F34E"]


def test_captions_name_style_and_subject(by_id):
    assert by_id["twemoji/1F34E"].captions == [
        "red apple in twemoji style",
        "a flat drawing of a red apple, twemoji style",
        "twemoji red apple: diet, food, fruit, health",
        "a twemoji emoji showing a red apple",
        "twemoji picture of red apple",
        "twemoji fruit, health, ripe",
    ]
    assert by_id["openmoji/1F1F5-1F1F9"].captions[0] == "openmoji style the flag of Portugal"
    assert "an openmoji emoji showing a frog" in by_id["openmoji/1F438"].captions
    tone = by_id["openmoji/1F469-1F3FD-200D-1F680"].captions
    assert tone[0] == "openmoji style woman astronaut with medium skin tone"
    assert len(tone) == 3


def test_all_captions_say_something_else(source):
    for picture in source.pictures:
        style = picture.id.split("/")[0]
        assert all(style in caption for caption in picture.captions), picture.captions
        assert len(set(picture.captions)) == len(picture.captions) >= 3
        assert all("  " not in c and c == c.strip() for c in picture.captions)


def test_split_is_by_concept(source):
    groups = {split: {p.group for p in source.pictures if p.split == split}
              for split in ("train", "val")}  # fmt: skip
    assert not groups["train"] & groups["val"]
    share = len(groups["val"]) / (len(groups["train"]) + len(groups["val"]))
    assert 0.08 < share < 0.12
    # a variant goes with its base
    tones = {p.split for p in source.pictures if p.group == "1F385"}
    assert len(tones) == 1
    assert sum(p.group == "1F385" for p in source.pictures) == 12


def test_weights_and_filters(by_id):
    assert by_id["openmoji/1F34E"].weight == 1
    assert by_id["openmoji/1F1F5-1F1F9"].weight == 0.1
    assert by_id["openmoji/1F385-1F3FD"].weight == 0.05
    other = emoji.source(
        styles=["twemoji"], drop_groups=["flags"], variants=False, variant_weight=0, flag_weight=2
    )
    kept = {p.id for p in other.pictures if not p.dropped}
    assert "twemoji/1F34E" in kept
    assert not kept & {"openmoji/1F34E", "twemoji/1F1F5-1F1F9", "twemoji/1F385-1F3FD"}
    # filters open the same cache
    assert [p.id for p in other.pictures] == list(by_id)


def few(source, ids):
    return replace(source, pictures=[p for p in source.pictures if p.id in ids])


def test_pictures(source, tmp_path):
    ids = ["openmoji/1F34E", "twemoji/1F34E", "openmoji/1F1F5-1F1F9", "twemoji/1F438"]
    images, manifest, _ = rendered(few(source, ids), 32, cache_dir=tmp_path, progress=False)
    assert sorted(manifest["ids"]) == sorted(ids)
    assert images.shape == (4, 32, 32, 3)
    for image in images:
        assert image[0, 0].tolist() == [255, 255, 255]  # transparent corners are white
        assert np.ptp(image, axis=(0, 1)).max() > 100
    apple = images[manifest["ids"].index("twemoji/1F34E"), 16, 16].astype(int)
    assert apple[0] > apple[1] + 80 > apple[2]  # red


def test_background_is_painted_and_named(tmp_path):
    source = emoji.source(background="blue")
    picture = few(source, ["twemoji/1F34E"])
    images, _, _ = rendered(picture, 16, cache_dir=tmp_path, progress=False)
    assert images[0, 0, 0].tolist() == [0, 0, 255]
    assert picture.pictures[0].captions[0] == "red apple in twemoji style on a blue background"


def test_a_drawing_that_is_not_square_is_centred(tmp_path):
    path = tmp_path / "wide.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20">'
        '<rect width="40" height="20" fill="#f00"/></svg>'
    )
    image = emoji.render(str(path), 32, background="white")
    assert image.shape == (32, 32, 3)
    assert image[16, 16].tolist() == [255, 0, 0]
    assert image[2, 16].tolist() == image[29, 16].tolist() == [255, 255, 255]


def test_a_missing_package_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "resvg_py" else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install resvg-py$"):
        open_dataset("emoji")


@pytest.mark.parametrize("options", [{"styles": ["apple"]}, {"drop_groups": ["cars"]}])
def test_unknown_filters(options):
    with pytest.raises(ValueError, match="emoji has the styles"):
        open_dataset("emoji", **options)

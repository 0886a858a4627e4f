"""Claim: a folder opens as its captions say, and what cannot be read is skipped and named."""

import json
import logging

import numpy as np
import pytest
from fixtures import write_folder, write_picture
from PIL import Image

from fastxm.data import CaptionedImages, open_dataset, prepare
from fastxm.data.pictures import flatten


def both(root, cache, **options) -> dict[str, CaptionedImages]:
    return {s: open_dataset(root, 8, s, cache, progress=False, **options) for s in ("train", "val")}


def captions_of(datasets) -> dict[str, list[str]]:
    return {i: c for ds in datasets.values() for i, c in zip(ds.ids, ds.captions)}


def test_jsonl(tmp_path):
    datasets = both(write_folder(tmp_path / "set", 30), tmp_path / "cache")
    assert not set(datasets["train"].ids) & set(datasets["val"].ids)
    assert len(datasets["train"]) + len(datasets["val"]) == 30
    assert len(datasets["val"]) > 0
    for dataset in datasets.values():
        for i, name in enumerate(dataset.ids):
            number = int(name.split(".")[0])
            assert dataset.images[i, 4, 4].tolist() == [number, 0, 0]
            assert dataset.captions[i] == [
                f"picture {number}",
                f"another caption of number {number}",
            ]
            assert float(dataset.image(i)[0, 4, 4]) == np.float32(number) / np.float32(255)
        assert dataset.weights.tolist() == [1.0] * len(dataset)
        assert dataset.skipped == []


def test_csv_and_text_files(tmp_path):
    for name in "abc":
        write_picture(tmp_path / "csv" / f"{name}.jpg", "green")
        write_picture(tmp_path / "txt" / "sub" / f"{name}.webp", "green")
        (tmp_path / "txt" / "sub" / f"{name}.txt").write_text(f"{name} one\n\n  {name}\ttwo \n")
    (tmp_path / "csv" / "metadata.csv").write_text(
        'file_name,text\na.jpg,"one, two"\nb.jpg,b\nc.jpg,c\nc.jpg,c again\n'
    )
    table = captions_of(both(tmp_path / "csv", tmp_path / "cache"))
    assert table == {"a.jpg": ["one, two"], "b.jpg": ["b"], "c.jpg": ["c", "c again"]}
    table = captions_of(both(tmp_path / "txt", tmp_path / "cache"))
    assert table == {f"sub/{n}.webp": [f"{n} one", f"{n} two"] for n in "abc"}


def test_split_folders(tmp_path):
    write_folder(tmp_path / "set" / "train", 5)
    write_folder(tmp_path / "set" / "val", 3)
    datasets = both(tmp_path / "set", tmp_path / "cache")
    assert datasets["train"].ids == [f"train/{i}.png" for i in range(5)]
    assert datasets["val"].ids == [f"val/{i}.png" for i in range(3)]


def test_unreadable_pictures_are_skipped_and_named(tmp_path, caplog):
    root = write_folder(tmp_path / "set", 6)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(root / "cut.png")
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:2000])
    (root / "empty.jpg").write_bytes(b"")
    with (root / "metadata.jsonl").open("a") as table:
        for name in ("cut.png", "empty.jpg", "gone.png"):
            table.write("\n" + json.dumps({"file_name": name, "text": "x"}))
        table.write("\n" + json.dumps({"file_name": "0.png", "text": None}))
    with caplog.at_level(logging.WARNING, "fastxm"):
        datasets = both(root, tmp_path / "cache")
    reasons = {path.split("/")[-1]: reason for path, reason in datasets["train"].skipped}
    assert set(reasons) == {"cut.png", "empty.jpg", "gone.png"}
    assert reasons["gone.png"] == "no such file"
    assert "cut.png" in caplog.text
    assert "6 pictures read, 3 skipped" in caplog.text
    assert len(datasets["train"]) + len(datasets["val"]) == 6


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_is_one_error(tmp_path, count):
    root = write_folder(tmp_path / "set", count)
    (root / "bad.png").write_bytes(b"x")
    with (root / "metadata.jsonl").open("a") as table:
        table.write("\n" + json.dumps({"file_name": "bad.png", "text": "x"}))
        table.write("\n" + json.dumps({"file_name": "1.png", "text": " "}))
    with pytest.raises(ValueError, match=rf"at least 2 captioned .* found {count} in .*; skipped "):
        open_dataset(root, 8, cache_dir=tmp_path / "cache")


def test_a_split_too_small_to_train_on(tmp_path):
    write_folder(tmp_path / "set" / "train", 1)
    write_folder(tmp_path / "set" / "val", 3)
    with pytest.raises(ValueError, match=r"found 1 in .*train"):
        open_dataset(tmp_path / "set", 8, "train", tmp_path / "cache")
    assert len(open_dataset(tmp_path / "set", 8, "val", tmp_path / "cache")) == 3


def test_pictures_without_any_caption(tmp_path):
    write_picture(tmp_path / "a.png", "red")
    write_picture(tmp_path / "b.png", "red")
    with pytest.raises(ValueError, match=r"found 0 .* skipped 2: a.png \(no caption\), b.png"):
        open_dataset(tmp_path, 8, cache_dir=tmp_path / "cache")


def test_a_long_caption_stays_whole(tmp_path):
    root = write_folder(tmp_path / "set", 4)
    (root / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": "word " * 10_000}) for i in range(4))
    )
    dataset = open_dataset(root, 8, cache_dir=tmp_path / "cache")
    assert len(dataset.captions[0][0].split()) == 10_000


def test_transparent_grey_and_turned_pictures(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 8, 4))  # white above, told to be shown turned by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("clear", "grey", "turned"):
        (tmp_path / f"{name}.txt").write_text(name)
    pixels = {i: image for ds in both(tmp_path, tmp_path / "cache").values()
              for i, image in zip(ds.ids, ds.images)}  # fmt: skip
    assert pixels["clear.png"].min() == 255
    assert (pixels["grey.png"] == 100).all()
    assert (pixels["turned.png"][0, 0, 0], pixels["turned.png"][7, 0, 0]) == (0, 255)


def test_greys_of_16_bits_keep_their_scale(tmp_path):
    greys = {"black": 0, "dark": 257, "middle": 100 * 257, "white": 65535}
    for name, grey in greys.items():
        pixels = np.full((8, 8), grey, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
        assert (np.asarray(flatten(Image.fromarray(pixels.astype(np.int32)))) == grey / 257).all()
    pixels = {i: image for ds in both(tmp_path, tmp_path / "cache").values()
              for i, image in zip(ds.ids, ds.images)}  # fmt: skip
    assert all((pixels[f"{name}.png"] == grey / 257).all() for name, grey in greys.items())


def test_crop_cuts_and_stretch_keeps(tmp_path):
    for name in ("a", "b"):
        wide = Image.new("RGB", (32, 8), "black")
        wide.paste("white", (12, 0, 20, 8))  # the middle square
        wide.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    cropped = open_dataset(tmp_path, 8, cache_dir=tmp_path / "cache").images
    stretched = open_dataset(tmp_path, 8, cache_dir=tmp_path / "cache", resize="stretch").images
    assert (cropped == 255).all()
    assert stretched[0, 4, 0].tolist() == [0, 0, 0]
    assert stretched[0, 4, 4].max() > 200
    with pytest.raises(ValueError, match="resize is one of"):
        open_dataset(tmp_path, 8, resize="squash")


def test_a_changed_picture_is_read_again(tmp_path):
    root = write_folder(tmp_path / "set", 4)
    before = open_dataset(root, 8, cache_dir=tmp_path / "cache")
    write_picture(root / "1.png", "#00ff00", (30, 30))
    after = open_dataset(root, 8, cache_dir=tmp_path / "cache")
    assert before.images[before.ids.index("1.png"), 0, 0].tolist() == [1, 0, 0]
    assert after.images[after.ids.index("1.png"), 0, 0].tolist() == [0, 255, 0]


def test_bad_metadata_and_arguments(tmp_path):
    root = write_folder(tmp_path / "set", 4)
    with pytest.raises(FileNotFoundError, match="'emoji' or a folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="split is one of"):
        open_dataset(root, 8, "test")
    with pytest.raises(ValueError, match="image_size"):
        open_dataset(root, 0)
    for line, message in [('{"file_name": ', "metadata.jsonl:1 is not JSON"),
                          ('["a", "b"]', r"metadata.jsonl:1 is not an object: \["),
                          ('{"text": "a"}', "without file_name"),
                          ('{"file_name": "0.png", "label": 3}', "without a caption")]:  # fmt: skip
        (root / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            open_dataset(root, 8)


def test_a_table_that_is_no_csv_is_named(tmp_path):
    for picture in "ab":
        write_picture(tmp_path / f"{picture}.png", "green")
    rest = "b.png,b\n" * 20_000  # which an open quote takes for its own
    (tmp_path / "metadata.csv").write_text(f'file_name,text\na.png,"an open quote\n{rest}')
    with pytest.raises(ValueError, match=r"metadata\.csv:\d+ is not CSV: field larger than"):
        open_dataset(tmp_path, 8)


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_text_that_is_not_utf_8_is_named(tmp_path, name):
    for picture in "ab":
        write_picture(tmp_path / f"{picture}.png", "green")
    (tmp_path / name).write_bytes('{"file_name": "a.png", "text": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not UTF-8: "):
        open_dataset(tmp_path, 8)


def test_select_and_prepare(tmp_path):
    datasets = prepare(write_folder(tmp_path / "set"), 8, cache_dir=tmp_path, progress=False)
    train = datasets["train"]
    few = train.select([3, 1])
    assert few.ids == [train.ids[3], train.ids[1]]
    assert (few.images == train.images[[3, 1]]).all()
    assert np.shares_memory(train.select([1, 2, 3]).images, train.images)
    assert train.batch([3, 1]).equal(few.batch([0, 1]))
    assert len(train.select([])) == 0


def test_pictures_without_captions_where_they_may_be(tmp_path):
    for name in "abcdef":
        write_picture(tmp_path / "set" / f"{name}.png", "green")
    (tmp_path / "set" / "a.txt").write_text("a caption\n")
    table = captions_of(both(tmp_path / "set", tmp_path / "cache", uncaptioned=True))
    assert table == {"a.png": ["a caption"], **{f"{name}.png": [] for name in "bcdef"}}

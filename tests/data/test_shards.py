"""Claim: tars hold what the same files in a folder do; what is not whole is skipped and named."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
from fixtures import CountingEncoder, write_folder
from PIL import Image

from fastxm import cli
from fastxm.data import CaptionedImages, folder, open_dataset, shards, text_features


def picture(colour: str, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, format)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, value in members.items():
            data = value.encode() if isinstance(value, str) else value
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def samples(first: int, last: int) -> dict[str, bytes | str]:
    """Keys 000000001 ..., as img2dataset writes them; a picture's red is its number."""
    members: dict[str, bytes | str] = {}
    for i in range(first, last):
        members[f"{i:09}.png"] = picture(f"#{i:02x}0000")
        members[f"{i:09}.txt"] = f"picture {i}"
        members[f"{i:09}.json"] = json.dumps({"caption": f"picture {i}", "width": 12})
    return members


def write_shards(root: Path, count: int = 3, each: int = 8) -> Path:
    for k in range(count):
        write_tar(root / f"{k:05}.tar", samples(k * each, (k + 1) * each))
    return root


def both(data, cache, **options) -> dict[str, CaptionedImages]:
    return {s: open_dataset(data, 8, s, cache, progress=False, **options) for s in ("train", "val")}


def table(datasets: dict[str, CaptionedImages]) -> dict[str, tuple]:
    """By the picture's own name: split, captions, pixels."""
    return {
        id.rpartition(":")[2]: (split, captions, image.tobytes())
        for split, dataset in datasets.items()
        for id, captions, image in zip(dataset.ids, dataset.captions, dataset.images)
    }


def test_a_tar_holds_what_its_files_hold_in_a_folder(tmp_path):
    files = write_folder(tmp_path / "files", 40)
    (files / "metadata.jsonl").unlink()
    for i in range(40):
        (files / f"{i}.txt").write_text(f"picture {i}\n\n another  caption of number {i}\n")
    (tmp_path / "shards").mkdir()
    for k in range(2):
        with tarfile.open(tmp_path / "shards" / f"{k}.tar", "w") as archive:
            for file in sorted(files.iterdir()):
                if int(file.stem) % 2 == k:
                    archive.add(file, file.name)
    expected = table(both(files, tmp_path / "cache"))
    assert {split for split, _, _ in expected.values()} == {"train", "val"}
    assert table(both(tmp_path / "shards", tmp_path / "cache")) == expected
    assert table(both(tmp_path / "shards" / "{0..1}.tar", tmp_path / "cache")) == expected
    stretched = table(both(files, tmp_path / "cache", resize="stretch"))
    assert table(both(tmp_path / "shards", tmp_path / "cache", resize="stretch")) == stretched


def test_formats_and_captions(tmp_path):
    members = {
        "a.jpg": picture("red", "jpeg"),
        "a.json": json.dumps({"captions": ["one", " ", "two"], "caption": "none"}),
        "b.WEBP": picture("red", "webp"),
        "b.txt": "of the text\nand another\n",
        "b.json": json.dumps({"caption": "of the json"}),
        "c.seg.png": picture("red"),
        "sub.dir/c.jpeg": picture("red", "jpeg"),
        "sub.dir/c.json": json.dumps({"caption": None, "text": "not looked at"}),
        "sub.dir/d.png": picture("red"),
        "sub.dir/d.json": json.dumps({"text": "of another column"}),
        "._a.jpg": b"of a Mac",
        "d.cls": "7",
    }
    tar = write_tar(tmp_path / "a.tar", members)
    datasets = both(tar, tmp_path / "cache")
    assert {name: captions for name, (_, captions, _) in table(datasets).items()} == {
        "a.jpg": ["one", "two"],
        "b.WEBP": ["of the text", "and another"],
        "sub.dir/d.png": ["of another column"],
    }
    assert datasets["train"].skipped == [(f"{tar}:sub.dir/c.jpeg", "no caption")]
    everything = table(both(tar, tmp_path / "cache", uncaptioned=True))
    assert everything["sub.dir/c.jpeg"][1] == []


def test_splits_by_folders(tmp_path):
    write_tar(tmp_path / "set" / "train" / "0.tar", samples(0, 5))
    write_tar(tmp_path / "set" / "val" / "0.tar", samples(5, 8))
    for data in (tmp_path / "set", tmp_path / "set" / "{val,train}" / "0.tar"):
        datasets = both(data, tmp_path / "cache")
        assert datasets["train"].ids == [f"train/0.tar:{i:09}.png" for i in range(5)]
        assert datasets["val"].ids == [f"val/0.tar:{i:09}.png" for i in range(5, 8)]


def test_a_key_in_two_tars_is_two_pictures_of_one_split(tmp_path):
    one, two = samples(0, 20), {name: value for name, value in samples(0, 20).items()}
    two |= {name: picture("blue") for name in two if name.endswith("png")}
    write_tar(tmp_path / "0.tar", one)
    write_tar(tmp_path / "1.tar", two)
    datasets = both(tmp_path, tmp_path / "cache")
    assert sum(map(len, datasets.values())) == 40
    keys = [{id.rpartition(":")[2] for id in dataset.ids} for dataset in datasets.values()]
    assert not keys[0] & keys[1]
    assert all(len(part) == 2 * len(names) for part, names in zip(datasets.values(), keys))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The tars whose headers are read."""
    seen: list[str] = []
    contents = shards.contents
    monkeypatch.setattr(shards, "contents", lambda tar: seen.append(tar.name) or contents(tar))
    return seen


def test_an_index_is_made_once_and_anew_for_a_tar_that_changed(tmp_path, opened):
    root = write_shards(tmp_path / "set")
    before = both(root, tmp_path / "cache")
    assert opened == ["00000.tar", "00001.tar", "00002.tar"]
    again = both(root, tmp_path / "cache")
    both(root / "{00000..00001}.tar", tmp_path / "cache", uncaptioned=True)
    assert len(opened) == 3
    assert table(again) == table(before)
    write_tar(root / "00001.tar", {**samples(8, 16), "n.png": picture("lime"), "n.txt": "new"})
    grown = table(both(root, tmp_path / "cache"))
    assert opened[3:] == ["00001.tar"]
    assert grown.keys() - table(before).keys() == {"n.png"}
    # as many bytes, other pixels: the time of the change tells
    size = (root / "00002.tar").stat().st_size
    members = {n: picture("#990000") if n[-3:] == "png" else v for n, v in samples(16, 24).items()}
    write_tar(root / "00002.tar", members)
    assert (root / "00002.tar").stat().st_size == size
    os.utime(root / "00002.tar", ns=(0, 1))
    changed = table(both(root, tmp_path / "cache"))
    assert opened[4:] == ["00002.tar"]
    assert changed["000000016.png"][2][:3] == b"\x99\0\0"


def test_processes_index_what_one_does(tmp_path):
    root = write_shards(tmp_path / "set", 6, 3)
    one = shards.source(root, cache_dir=tmp_path / "1", workers=1, progress=False)
    two = shards.source(root, cache_dir=tmp_path / "2", workers=2, progress=False)
    assert one.pictures == two.pictures
    assert len(one.pictures) == 18


def cut(tar: Path, length: int) -> None:
    tar.write_bytes(tar.read_bytes()[:length])


# a tar of 8 samples has 24 members of 2 blocks: 0.png is in bytes 0 to 1023, 0.txt to 2047, ...
@pytest.mark.parametrize(
    ("length", "whole", "reason"),
    [
        (9 * 1024 + 540, 3, "after 9 of its pictures and texts: 000000011.png is cut off"),
        (9 * 1024 + 100, 3, "after 9 of its pictures and texts: no header and no end at byte 9216"),
        (9 * 1024, 3, "after 9 of its pictures and texts: no header and no end at byte 9216"),
        (100, 0, "after 0 of its pictures and texts: truncated header"),
        (0, 0, "after 0 of its pictures and texts: empty file"),
    ],
)
def test_of_a_truncated_tar_what_is_whole_is_taken(tmp_path, caplog, length, whole, reason):
    root = write_shards(tmp_path / "set", 2)
    cut(root / "00001.tar", length)
    for _ in range(2):  # an index from the cache says it too
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastxm"):
            datasets = both(root, tmp_path / "cache")
        assert sum(map(len, datasets.values())) == 8 + whole
        ((path, found),) = datasets["train"].skipped
        assert Path(path).name == "00001.tar"
        assert found == f"no whole tar, {reason}"
        assert f"00001.tar: {found}" in caplog.text
        assert f"{8 + whole} pictures read, 1 skipped" in caplog.text


def test_a_header_overwritten_in_the_middle_is_no_end(tmp_path):
    root = write_shards(tmp_path / "set", 2)
    whole = bytearray((root / "00001.tar").read_bytes())
    whole[9 * 1024 : 9 * 1024 + 512] = b"x" * 512
    (root / "00001.tar").write_bytes(whole)
    datasets = both(root, tmp_path / "cache")
    assert sum(map(len, datasets.values())) == 8 + 3
    assert "no header and no end at byte 9216" in datasets["train"].skipped[0][1]


def test_a_compressed_tar_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / "set" / name, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match=r"found 0 in .*; skipped 2: 0.tar \(no whole tar"):
        open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache")


def test_what_cannot_be_read_is_skipped_and_counted(tmp_path, caplog):
    bad = {
        "broken.png": picture("red")[:40],
        "broken.txt": "x",
        "mute.png": picture("red"),
        "blind.txt": "x",
        "blind.json": json.dumps({"caption": "x"}),
        "latin.png": picture("red"),
        "latin.txt": "café".encode("latin-1"),
        "half.png": picture("red"),
        "half.json": '{"caption": ',
        "list.png": picture("red"),
        "list.json": '["x"]',
        "empty.jpg": b"",
        "empty.txt": "x",
        "000000000.jpg": picture("red", "jpeg"),
    }
    tar = write_tar(tmp_path / "0.tar", {**samples(0, 4), **bad})
    with caplog.at_level(logging.WARNING, "fastxm"):
        datasets = both(tar, tmp_path / "cache")
    assert sum(map(len, datasets.values())) == 4
    reasons = {path.rpartition(":")[2]: reason for path, reason in datasets["train"].skipped}
    assert reasons.pop("latin.png").startswith("latin.txt: 'utf-8' codec can't decode")
    assert reasons.pop("half.png").startswith("half.json: Expecting value")
    assert "Error: " in reasons.pop("broken.png")
    assert "Error: " in reasons.pop("empty.jpg")
    assert reasons == {
        "mute.png": "no caption",
        "list.png": "no caption",
        "blind.txt": "no picture",
        "blind.json": "no picture",
        "000000000.jpg": "a second picture of its key",
    }
    assert "4 pictures read, 9 skipped" in caplog.text


def test_names_are_no_paths(tmp_path):
    names = ["../../up", "/tmp/fastxm-shards-absolute", "~/home", "caf\udce9"]  # the last: Latin-1
    members: dict[str, bytes | str] = {}
    for name in names:
        members |= {f"{name}.png": picture("red"), f"{name}.txt": "x"}
    tar = write_tar(tmp_path / "deep" / "set" / "0.tar", members)
    with tarfile.open(tar, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            header = tarfile.TarInfo(f"link{kind[0]}.png")
            header.type, header.linkname = kind, "/etc/hostname"
            archive.addfile(header)
    datasets = both(tar, tmp_path / "cache")
    assert sorted(table(datasets)) == sorted(f"{name}.png" for name in names)
    assert datasets["train"].skipped == []
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".txt")] == []
    assert not Path("/tmp/fastxm-shards-absolute.png").exists()


def test_patterns():
    assert shards.expand("s/{08..11}.tar") == [f"s/{i}.tar" for i in ("08", "09", "10", "11")]
    assert shards.expand("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert shards.expand("plain.tar") == ["plain.tar"]


def test_bad_patterns_and_folders_are_one_error(tmp_path):
    root = write_shards(tmp_path / "set")
    for pattern, message in [
        ("{00001..00009}.tar", r"stands for 9 tars, 7 of them missing: .*00003.tar"),
        ("{10..12}.tar", r"stands for 3 tars, 3 of them missing: .*10.tar"),
        ("0.tar", r"stands for 1 tars, 1 of them missing: .*0.tar"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            open_dataset(root / pattern, 8, cache_dir=tmp_path / "cache")
    for pattern in ("{}.tar", "{1..}.tar", "{7..3}.tar", "{a}.tar"):
        with pytest.raises(ValueError, match=r"is no range \{00..99\} and no list \{a,b\}"):
            open_dataset(root / pattern, 8, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="resize is one of"):
        open_dataset(root, 8, cache_dir=tmp_path / "cache", resize="squash")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"at least 2 captioned .* found 0 in .*nothing"):
        open_dataset(tmp_path / "nothing", 8, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("beside", ["sub/a.jpg", "metadata.jsonl"])
def test_a_folder_of_pictures_stays_one_with_a_tar_in_it(tmp_path, beside):
    root = write_shards(tmp_path / "set")
    assert shards.is_shards(root)
    (root / beside).parent.mkdir(exist_ok=True)
    (root / beside).write_bytes(b"")
    assert not shards.is_shards(root)


def test_features_are_those_of_the_folder(tmp_path):
    """Captions are encoded once, in whichever form they come."""
    dataset = open_dataset(write_shards(tmp_path / "set"), 8, "train", tmp_path, progress=False)
    first, again = CountingEncoder(), CountingEncoder()
    text_features(dataset, first, progress=False)
    text_features(dataset, again, progress=False)
    assert len(first.seen) == len(dataset)
    assert again.seen == []


TINY = ["--gf", "2", "--df", "2", "--z-dim", "4", "--cond-dim", "4", "--image-size", "64",
        "--batch-size", "3", "--precision", "fp32", "--pretrained-weight", "0", "--samples", "2",
        "--device", "cpu", "--log-every", "1"]  # fmt: skip


def test_commands_take_shards_as_a_folder(tmp_path, monkeypatch, capsys):
    root = write_shards(tmp_path / "set")
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pattern = "set/{00000..00002}.tar"
    assert cli.main(["prepare", pattern, "--image-size", "64", "--text-encoder", "none"]) == 0
    assert "set: 23 train, 1 val pictures of 64 px" in capsys.readouterr().out
    assert cli.main(["train", "xmcgan", "--data", pattern, *TINY, "--steps", "2"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == "xmcgan-set-emoji-64"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert (run / "model" / "model.safetensors").is_file()
    assert cli.main(["train", "xmcgan", "--resume", "--out", str(run), "--steps", "3"]) == 0
    capsys.readouterr()
    (root / "00001.tar").unlink()
    assert cli.main(["train", "xmcgan", "--data", pattern, *TINY, "--out", "other"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastxm: error: set/{00000..00002}.tar stands for 3 tars, 1 of them")
    assert said.count("\n") == 1


def test_every_suffix_of_a_folder_is_one_of_shards():
    assert tuple(f".{kind}" for kind in shards.PICTURES) == folder.SUFFIXES

"""Claim: a cache is whole or it is not there, and a whole one is not made again."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from fixtures import same, write_folder

from fastxm.data import folder
from fastxm.data.pictures import Picture, Source, rendered


class Reader:
    """Fills a picture with the number in its path; stops or fails where it is told to."""

    def __init__(self, stop_at=None, broken=()):
        self.stop_at, self.broken, self.calls = stop_at, broken, 0

    def __call__(self, path, size):
        self.calls += 1
        if int(path) == self.stop_at:
            raise KeyboardInterrupt
        if int(path) in self.broken:
            raise OSError("truncated")
        return np.full((size, size, 3), int(path), np.uint8)


def source(reader, count=10) -> Source:
    pictures = [
        Picture(id=f"{i:03}", path=str(i), captions=["x"], group=str(i), split="train")
        for i in range(count)
    ]
    return Source("numbers", pictures, reader)


def make(reader, directory, **options):
    return rendered(source(reader), 4, cache_dir=directory, workers=1, progress=False, **options)


def test_a_second_run_reads_nothing(tmp_path):
    first, again = Reader(), Reader()
    images, manifest, directory = make(first, tmp_path)
    assert first.calls == 10
    assert list(images[:, 0, 0, 0]) == list(range(10))
    assert images.dtype == np.uint8
    assert same(make(again, tmp_path)[0], images)
    assert again.calls == 0
    assert manifest["files"]["images.npy"]["bytes"] == (directory / "images.npy").stat().st_size


def test_an_interrupted_run_leaves_no_cache(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(Reader(stop_at=7), tmp_path)
    assert list(tmp_path.glob("numbers*/manifest.json")) == []
    assert [p for p in tmp_path.glob("numbers*") if p.is_dir()] == []
    images, _, _ = make(Reader(), tmp_path)
    assert list(images[:, 0, 0, 0]) == list(range(10))
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_a_truncated_cache_is_made_again(tmp_path):
    _, _, directory = make(Reader(), tmp_path)
    whole = (directory / "images.npy").read_bytes()
    (directory / "images.npy").write_bytes(whole[:-5])
    again = Reader()
    make(again, tmp_path)
    assert again.calls == 10
    assert (directory / "images.npy").read_bytes() == whole


@pytest.mark.parametrize(("verify", "calls"), [(False, 0), (True, 10)])
def test_verify_finds_a_changed_byte(tmp_path, verify, calls):
    _, _, directory = make(Reader(), tmp_path)
    whole = (directory / "images.npy").read_bytes()
    (directory / "images.npy").write_bytes(whole[:-1] + b"\xff")
    again = Reader()
    make(again, tmp_path, verify=verify)
    assert again.calls == calls


def test_an_unreadable_manifest_is_no_cache(tmp_path):
    _, _, directory = make(Reader(), tmp_path)
    (directory / "manifest.json").write_text('{"made_of": ')
    again = Reader()
    make(again, tmp_path)
    assert again.calls == 10


def test_broken_pictures_are_skipped_and_named(tmp_path, caplog):
    images, manifest, _ = make(Reader(broken=(0, 4, 9)), tmp_path)
    assert list(images[:, 0, 0, 0]) == [1, 2, 3, 5, 6, 7, 8]
    assert manifest["ids"] == ["001", "002", "003", "005", "006", "007", "008"]
    assert manifest["skipped"] == [["0", "OSError: truncated"], ["4", "OSError: truncated"],
                                   ["9", "OSError: truncated"]]  # fmt: skip
    assert "skipped 4: OSError: truncated" in caplog.text


def test_size_and_origin_are_other_caches(tmp_path):
    base = source(Reader())
    _, _, a = rendered(base, 4, cache_dir=tmp_path, progress=False)
    _, _, b = rendered(base, 5, cache_dir=tmp_path, progress=False)
    _, _, c = rendered(replace(base, made_of={"v": 2}), 4, cache_dir=tmp_path, progress=False)
    assert len({a, b, c}) == 3


SLOW = """
import os, sys, time
import numpy as np
from fastxm.data import pictures
from fastxm.data.pictures import Picture, Source, rendered
pictures.FEW = 0
def read(path, size):
    os.write(1, b"reading\\n")  # at once: two processes write
    time.sleep(0.05)
    return np.zeros((size, size, 3), np.uint8)
all = [Picture(f"{i:03}", str(i), ["x"], str(i), "train") for i in range(2000)]
rendered(Source("numbers", all, read), 4, cache_dir=sys.argv[1], workers=2, progress=False)
"""


def test_a_killed_run_leaves_no_cache_and_no_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert run.stdout.readline() == b"reading\n"
    run.kill()
    run.communicate(timeout=30)  # to the end of its output: the workers hold it, and are gone
    assert [p.name for p in tmp_path.glob("numbers*") if p.is_dir()] == []
    with FileLock(next(tmp_path.glob("*.lock")), timeout=1):
        pass


def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("fastxm.data.pictures.FEW", 0)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.txt").write_text("broken")
    origin = folder.source(write_folder(tmp_path / "a"))
    bad = Picture("bad.png", str(tmp_path / "bad.png"), ["broken"], "bad", "train")
    origin = replace(origin, pictures=[*origin.pictures, bad])
    one, first, _ = rendered(origin, 8, cache_dir=tmp_path / "1", workers=1, progress=False)
    two, second, _ = rendered(origin, 8, cache_dir=tmp_path / "2", workers=2, progress=False)
    assert same(one, two)
    assert first["ids"] == second["ids"]
    assert len(one) == 12
    assert [Path(path).name for path, _ in second["skipped"]] == ["bad.png"]

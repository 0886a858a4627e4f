"""Data sets of plain pictures, cached in folders of their own, and a CLIP without training."""

import pytest
from small import Letters, pictures
from tiny_clip import write

from fastxm.training import xmcgan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(xmcgan, "text_encoder", lambda *_, **__: Letters())
    return pictures(tmp_path / "pictures")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"))

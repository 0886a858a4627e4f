"""A data set of plain pictures, cached in a folder of its own."""

import pytest
from small import pictures

from fastxm.training import xmcgan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(xmcgan, "text_encoder", xmcgan.text_encoder)  # put back after the test
    return pictures(tmp_path / "pictures")

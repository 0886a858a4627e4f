"""Sample grids and what happens to long captions."""

import numpy as np
import pytest
import torch
from PIL import ImageFont

from fastxm.training.logging import grid, wrap


def test_pictures_stand_in_rows_with_text_below():
    images = torch.zeros(5, 3, 64, 64)
    images[3, 0] = 1.0  # red
    sheet = np.asarray(grid(images, ["a", "b", "c", "", "e"], columns=3))
    assert sheet.shape == (2 * (128 + 8 + 42) + 8, 3 * 136 + 8, 3)
    second_row = 8 + 178
    assert (sheet[second_row : second_row + 128, 8:136] == (255, 0, 0)).all()
    below = sheet[8 + 128 : 8 + 170]
    assert (below[:, 8:136] < 255).any()  # the caption "a"
    assert (sheet[second_row + 128 :, 8:136] == 255).all()  # the empty caption


@pytest.mark.parametrize("text", ["", "a red apple on a wooden table", "x" * 500, "é漢字 " * 5000])
def test_wrapped_lines_fit(text):
    font = ImageFont.load_default(11)
    lines = wrap(text, 128, font)
    assert all(font.getlength(line) <= 128 for line in lines)
    if len(text) < 50:
        assert " ".join(lines) == text


def test_grid_says_what_it_needs():
    with pytest.raises(ValueError, match="N captions"):
        grid(torch.zeros(2, 3, 8, 8), ["one"])

"""What a machine of fewer instructions computes: the same, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastxm import _C
from fastxm.ops import info_nce, mmd2, region_word_scores
from fastxm.ops.siglip import siglip

HERE = Path(__file__).parent  # where `fastxm` is what is installed, not the source beside it
LEVELS = ["avx512", "avx2", "x86-64"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def results(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Values and gradients of every op with a kernel for the CPU."""
    random = torch.Generator().manual_seed(0)

    def rows(*shape):
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    def of(value, *leaves):
        return [value.detach(), *torch.autograd.grad(value.float().square().sum(), leaves)]

    labels = torch.randint(9, (333,), generator=random)
    x, y, z, regions = rows(333, 98), rows(333, 98), rows(130, 98), rows(9, 33, 98)
    few = {"symmetric": False, "offset": 7}
    found = {}
    for stored in (0, 1 << 20):
        loss = info_nce(x, y, 4.0, labels=labels, label_smoothing=0.1, stored_bytes=stored)
        found[f"labels {stored}"] = of(loss, x, y)
        found[f"plain {stored}"] = of(info_nce(x, y, 20.0, stored_bytes=stored), x, y)
        found[f"few {stored}"] = of(info_nce(z, y, 20.0, stored_bytes=stored, **few), z, y)
        far = info_nce(x, y, 4000.0, stored_bytes=stored)  # no reference serves all of a tile
        found[f"far {stored}"] = of(far / 4000, x, y)
    found["siglip"] = of(siglip(x, y, 4.0, -1.0), x, y)
    found["mmd"] = of(mmd2(y, z), y, z)
    words = z[:126].view(9, 14, 98)
    lengths = torch.tensor([14, 3, 1, 9, 14, 7, 2, 5, 11])
    found["region_word"] = of(region_word_scores(regions, words, lengths), regions, z)
    return found


def main(path: str) -> None:
    found = {name: results(dtype) for name, dtype in DTYPES.items()}
    torch.save({"level": _C.build_info()["cpu"], **found}, path)


@pytest.fixture(scope="module")
def here():
    return {name: results(dtype) for name, dtype in DTYPES.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_fewer_instructions_compute_the_same(level, here, tmp_path):
    own = _C.build_info()["cpu"].split(",")[0]
    if own not in LEVELS or LEVELS.index(level) < LEVELS.index(own):
        pytest.skip("this machine has fewer")
    environment = {**os.environ, "FASTXM_CPU_LEVEL": level}
    script = f"import test_cpu_levels; test_cpu_levels.main({str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=HERE)
    there = torch.load(tmp_path / "there", weights_only=True)
    assert there["level"] == level
    # other orders of sums and other exponentials; of bfloat16 also what is widened, not rounded
    for dtype, roundings in (("float32", 32), ("bfloat16", 2)):
        most = roundings * torch.finfo(DTYPES[dtype]).eps
        for name, values in here[dtype].items():
            for ours, theirs in zip(values, there[dtype][name], strict=True):
                error = (ours.double() - theirs.double()).norm() / ours.double().norm()
                assert error < most, (dtype, name, float(error))


def test_a_level_that_there_is_not_is_refused():
    environment = {**os.environ, "FASTXM_CPU_LEVEL": "avx1024"}
    done = subprocess.run([sys.executable, "-c", "from fastxm import _C"], env=environment,
                          capture_output=True, text=True, cwd=HERE)  # fmt: skip
    assert done.returncode
    assert "avx512, avx2 or x86-64, not avx1024" in done.stderr

"""The house keeps its shape: every op has its room, and nothing grows past its size."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["info_nce", "region_word", "mmd", "modulation", "siglip"]
BENCHMARKS = {"siglip": "info_nce"}  # two losses of the same pairs, in one table
SHARED = {"gemm"}  # native helpers that several rooms call
SOURCES = {".py", ".cpp", ".cu", ".h", ".cuh"}
SIZES = [("fastxm/ops", 150), ("kernels", 300), ("csrc", 300), ("fastxm", 500)]


@pytest.mark.parametrize("op", ROOMS)
def test_room_is_whole(op):
    whole = [f"fastxm/ops/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py",
             f"benchmarks/bench_{BENCHMARKS.get(op, op)}.py"]  # fmt: skip
    assert [path for path in whole if not (ROOT / path).exists()] == []


def linked(path: Path) -> bool:
    # an in-place checkout may hold fastxm/kernels as a link to kernels/
    return "fastxm/kernels" in path.as_posix()


def test_no_file_outgrows_its_size():
    large = {}
    for folder, limit in SIZES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCES and not linked(path):
                lines = path.read_text().count("\n")
                if lines > limit:
                    large[str(path.relative_to(ROOT))] = lines
    assert large == {}


def test_every_kernel_has_a_room():
    kernels = [*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "kernels").glob("*.py")]
    homeless = {p.stem for p in kernels} - {"__init__", *ROOMS, *SHARED}
    parts = tuple(f"{op}_" for op in ROOMS)
    assert {stem for stem in homeless if not stem.startswith(parts)} == set()

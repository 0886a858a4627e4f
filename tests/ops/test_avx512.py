"""AVX-512, its bfloat16 and AMX on a processor that has not all of them: their own source, with the
instructions as functions."""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from fastxm import _C

TESTS = Path(__file__).parents[1]
NATIVE, SOURCE = TESTS / "native", TESTS.parent / "csrc"
OPS = ["gemm", "info_nce", "mmd", "region_word", "siglip"]


def build(library: Path) -> None:
    """fastxm._C with those instructions emulated."""
    # PyTorch brings pybind11's headers
    folders = [SOURCE, NATIVE, *cpp_extension.include_paths(), sysconfig.get_path("include")]
    maths = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    sources = [SOURCE / "module.cpp", *sorted((SOURCE / "cpu").glob("*.cpp"))]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-fopenmp",
               "-fvisibility=hidden", "-w", "-Wno-psabi", *maths,
               "-include", str(NATIVE / "avx512_emulator.h"),
               *(f"-I{path}" for path in folders), *map(str, sources),
               "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)


def run(library: Path, every: int, only: str, **variables: str) -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    kept = {name: value for name, value in os.environ.items() if name != "FASTXM_CPU_LEVEL"}
    environment = {**kept, "EMULATED_CPU": str(library), "EMULATED_EVERY": str(every),
                   "PYTHONPATH": path, **variables}  # fmt: skip
    files = [str(TESTS / f"ops/test_{op}.py") for op in OPS]
    command = [sys.executable, "-m", "pytest", "-p", "emulated_cpu", "-p", "no:cacheprovider",
               *files, "-k", only]  # fmt: skip
    place = {"cwd": library.parent, "env": environment}
    found = subprocess.run(command, **place, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or _C.build_info()["cpu"] == "x86-64",
    reason="emulated by AVX2",
)
@pytest.mark.skipif(_C.build_info()["cpu"] == "avx512, amx", reason="this machine has them all")
def test_ops_by_emulated_instructions(tmp_path):
    library = tmp_path / "_C.so"
    build(library)
    run(library, 10, "not triton and not reference and not derivatives and not dispatch")
    without_amx = {"FASTXM_CPU_LEVEL": "avx512"}
    run(library, 40, "(backward or bfloat16) and not triton and not reference", **without_amx)

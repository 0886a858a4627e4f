"""On a GPU of the CPU's memory: trainings keep to it, no step waits for it, ops take its ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="PyTorch has a CUDA of its own"
)
TESTS = Path(__file__).parent
TRAININGS = [
    "test_xmcgan_recipe.py::test_a_checkpoint_of_another_model_is_refused",
    "test_mirrorgan_recipe.py::test_a_resumed_run_is_the_unbroken_one",
    "test_selfsup_stages.py::test_all_stages_in_order",
    "test_vdl_recipe.py::test_a_resumed_run_is_one_never_stopped",
    "test_joint_discriminators.py::test_a_projected_run_resumes",
]

# of their tests every which one
OPS = {"info_nce": 10, "siglip": 3, "region_word": 40, "mmd": 18, "modulation": 8}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("native") / "libpretend_gpu.so"
    folders = cpp_extension.library_paths()
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC",
               *(f"-I{path}" for path in cpp_extension.include_paths()),
               str(TESTS / "native/pretend_gpu.cpp"), "-o", str(made),
               *(f"-L{path}" for path in folders), *(f"-Wl,-rpath,{path}" for path in folders),
               "-lc10", "-ltorch_cpu"]  # fmt: skip
    subprocess.run(command, check=True)
    return made


def run(library, *arguments, **variables):
    """Runs tests on it."""
    command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider"]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**kept, "PRETEND_GPU": str(library), "PYTHONPATH": path, **variables}
    # not from the source folder, where fastxm may be without its native part
    place = {"cwd": library.parent, "env": environment}
    found = subprocess.run([*command, *arguments], **place, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_keeps_to_its_gpu(training, library):
    run(library, str(TESTS / "training" / training))


@pytest.mark.parametrize(("op", "every"), OPS.items())
def test_an_op_takes_the_gpu_s_way(op, every, library):
    """By Triton's interpreter; bfloat16 is left out, which it multiplies wrongly."""
    only = "cuda and test_forward and not dtype1 and not bfloat16"
    options = {"TRITON_INTERPRET": "1", "PRETEND_EVERY": str(every)}
    run(library, str(TESTS / f"ops/test_{op}.py"), "-k", only, **options)

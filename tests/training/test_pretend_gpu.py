"""Trainings keep to their GPU, and no step waits for it: on a GPU of the CPU's memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

TESTS = Path(__file__).parents[1]
TRAININGS = [
    "test_xmcgan_recipe.py::test_a_checkpoint_of_another_model_is_refused",
    "test_mirrorgan_recipe.py::test_a_resumed_run_is_the_unbroken_one",
    "test_selfsup_stages.py::test_all_stages_in_order",
    "test_vdl_recipe.py::test_a_resumed_run_is_one_never_stopped",
    "test_joint_discriminators.py::test_a_projected_run_resumes",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("native") / "pretend_gpu.so"
    folders = cpp_extension.library_paths()
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC",
               *(f"-I{path}" for path in cpp_extension.include_paths()),
               str(TESTS / "native/pretend_gpu.cpp"), "-o", str(made),
               *(f"-L{path}" for path in folders), *(f"-Wl,-rpath,{path}" for path in folders),
               "-lc10", "-ltorch_cpu"]  # fmt: skip
    subprocess.run(command, check=True)
    return made


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has a CUDA of its own")
@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_keeps_to_its_gpu(training, library):
    command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider",
               str(TESTS / "training" / training)]  # fmt: skip
    places = [str(TESTS), *sys.path]
    environment = {**os.environ, "PRETEND_GPU": str(library), "PYTHONPATH": os.pathsep.join(places)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]

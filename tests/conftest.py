"""Fixtures: the devices of this machine, a fixed seed, and poisoned fresh memory."""

import importlib.util
import os

# tests are small: more threads would only wait for each other, all the more on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# without a GPU, Triton kernels run in the interpreter; it must be told before they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


def mend_interpreter() -> None:
    """Lets the interpreter of older Triton take NumPy 2.5's arrays of one number for a number."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    mend_interpreter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        metafunc.parametrize("device", devices)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    # deterministic mode fills torch.empty with NaN: a kernel that leaves a value unwritten shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

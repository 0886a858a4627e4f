"""A GPU of the CPU's memory, as a plugin of pytest: `python -m pytest -p pretend_gpu ...`.

Tensors on it hold one of the CPU's, which computes; ops take their reference path, or, if Triton
is interpreted, the GPU's. What a GPU would refuse is refused: tensors of both in one operation.
What it would be waited for in a training's step is listed at the end, and is a failure. Only where
PyTorch has no CUDA of its own. PRETEND_GPU names the library of tests/native/pretend_gpu.cpp;
of the tests every PRETEND_EVERYth is run.
"""

import collections
import contextlib
import ctypes
import os
import traceback
from types import SimpleNamespace

ctypes.CDLL(os.environ["PRETEND_GPU"])  # before PyTorch asks for the first time

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch.utils import _python_dispatch as dispatch  # noqa: E402
from torch.utils._pytree import tree_iter, tree_map  # noqa: E402

ON_THE_CPU = {"_pack_padded_sequence"}  # of which PyTorch wants an argument on the CPU
EITHER = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"} | ON_THE_CPU
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}
DECIDES = {"if loss > self.losing:"}  # GANToText asks so in its step
waited: collections.Counter[str] = collections.Counter()  # where
inside: list[str] = []  # what the loop is at


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("cuda", 0),
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"OnGPU({self.inner!r})"

    def __format__(self, form):
        return format(self.inner, form)

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def pin_memory(self):
        raise RuntimeError("what is on the GPU cannot be pinned")

    def __deepcopy__(self, memo):
        made = OnGPU(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made


class Everywhere(dispatch.TorchDispatchMode):
    """What makes tensors of nothing comes here, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def wait(what: str) -> None:
    if inside and inside[-1] in ("batch", "step"):
        frames = [f for f in traceback.extract_stack() if "/fastxm/" in f.filename]
        file = frames[-1].filename.split("/fastxm/")[-1]
        if frames[-1].line not in DECIDES:
            waited[f"{what}: {file}:{frames[-1].lineno}"] += 1


def own(x):
    return x.inner if isinstance(x, OnGPU) else x


def run(func, args, kwargs):
    """An operation of PyTorch, by the CPU."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    others = [x for x in tensors if not isinstance(x, OnGPU) and x.ndim]
    if ours and others and name not in EITHER:
        raise RuntimeError(f"{name} of tensors on the CPU and on the GPU")
    if ours and func.namespace == "fastxm":
        with Everywhere():
            return OPDEFS[func._schema.name]._backend_fns[None](*args, **kwargs)
    if name == "to":  # below autograd it is not taken apart
        with Everywhere():
            return func.decompose(*args, **kwargs)
    device = kwargs.get("device")
    there = bool(ours) if device is None else torch.device(device).type == "cuda"
    moved = name == "_to_copy" and there != bool(ours)
    moved |= name == "copy_" and bool(ours) and bool(others)
    moved |= name.startswith("index") and bool(ours) and bool(others)
    if (name in WAITS and ours) or (moved and not kwargs.get("non_blocking")):
        wait(f"{name} to the {'GPU' if there else 'CPU'}" if moved else name)
    if name == "copy_":
        there = isinstance(args[0], OnGPU)
    if device is not None and there:
        kwargs = {**kwargs, "device": "cpu"}
    made = OWN.get(name, OWN.get(str(func), func))(*tree_map(own, args), **tree_map(own, kwargs))
    if name in ON_THE_CPU and there:
        return OnGPU(made[0]), made[1]
    given = {id(x.inner): x for x in ours}  # which operations in place give back

    def held(x):
        if not there or not isinstance(x, Tensor):
            return x
        return given[id(x)] if id(x) in given else OnGPU(x)

    return tree_map(held, made)


def cell(inputs, hidden, c, bias=None, hidden_bias=None):
    """_thnn_fused_lstm_cell, which the CPU has not."""
    gates = inputs + hidden + (0 if bias is None else bias + hidden_bias)
    i, f, g, o = (t(x) for t, x in zip(GATES, gates.chunk(4, 1)))
    after = f * c + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def cell_backward(d_out, d_c, before, after, gates, has_bias):
    i, f, g, o = gates.chunk(4, 1)
    t = after.tanh()
    d_out, d_c = (torch.zeros_like(after) if x is None else x for x in (d_out, d_c))
    d_c = d_c + d_out * o * (1 - t * t)
    d = [d_c * g * i * (1 - i), d_c * before * f * (1 - f), d_c * i * (1 - g * g),
         d_out * t * o * (1 - o)]  # fmt: skip
    d_gates = torch.cat(d, 1)
    return d_gates, d_c * f, d_gates.sum(0) if has_bias else None


GATES = torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid


def wide_product(x, y, out_dtype, out=None):
    """torch.mm and torch.bmm of halves, as the CPU cannot make them."""
    made = torch.matmul(x.to(out_dtype), y.to(out_dtype))
    return made if out is None else out.copy_(made)


OWN = {
    "_thnn_fused_lstm_cell": cell,
    "_thnn_fused_lstm_cell_backward_impl": cell_backward,
    **{f"aten.{f}.dtype{out}": wide_product for f in ("mm", "bmm") for out in ("", "_out")},
}


@contextlib.contextmanager
def mark(name):
    inside.append(name)
    try:
        yield
    finally:
        inside.pop()


def patch(to: pytest.MonkeyPatch) -> None:
    """What PyTorch and transformers would not do so."""
    from fastxm import _C
    from fastxm.training import precision, trainer

    without_cuda = {**_C.build_info(), "cuda": False}  # whose kernels ask the driver
    of_lists, save, load = torch.tensor, torch.save, transformers.PreTrainedModel.from_pretrained
    orthogonal_ = torch.nn.init.orthogonal_

    def tensor(data, *args, device=None, **kwargs):  # no operation of PyTorch's
        made = of_lists(data, *args, **kwargs)
        return made if device is None else made.to(device)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):  # which changes how tensors are made
        with dispatch._disable_current_modes(), to.context() as undone:
            undone.setattr(torch, "tensor", of_lists)
            return load.__func__(cls, *args, **kwargs)

    def orthogonal(x, *args, **kwargs):  # transposes a tensor in place
        with torch.no_grad():
            orthogonal_(own(x), *args, **kwargs)
        return x

    nothing, generator = contextlib.nullcontext(), torch.get_rng_state
    h200 = SimpleNamespace(multi_processor_count=132)
    for name, value in {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "is_bf16_supported": lambda *_, **__: True, "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None, "get_rng_state_all": lambda: [generator()],
        "get_rng_state": lambda *_: generator(), "set_rng_state_all": lambda states: None,
        "device_of": lambda x: nothing, "get_device_properties": lambda device: h200,
        "get_device_capability": lambda *_: (9, 0),
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0),
    }.items():  # fmt: skip
        to.setattr(torch.cuda, name, value)
    to.setattr(Tensor, "pin_memory", lambda x: x)
    to.setattr(torch, "tensor", tensor)
    to.setattr(torch, "save", lambda x, *args, **kwargs: save(tree_map(own, x), *args, **kwargs))
    to.setattr(torch, "inference_mode", torch.no_grad)
    to.setattr(torch.nn.init, "orthogonal_", orthogonal)
    to.setattr(transformers.PreTrainedModel, "from_pretrained", from_pretrained)
    to.setattr(precision, "pick_device", lambda name: torch.device("cuda"))
    to.setattr(trainer, "mark", mark)
    to.setattr(_C, "build_info", lambda: without_cuda)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


patch(pytest.MonkeyPatch())  # before other modules take these names


@pytest.fixture(autouse=True, scope="session")
def _pretend():
    from fastxm.ops import backend

    usual = contextlib.nullcontext() if "TRITON_INTERPRET" in os.environ else backend("reference")
    with torch.autograd.set_multithreading_enabled(False), Everywhere(), usual:
        yield


def pytest_collection_modifyitems(items):
    items[:] = items[:: int(os.environ.get("PRETEND_EVERY", "1"))]


def pytest_sessionfinish(session):
    for where, times in waited.most_common():
        print(f"\na step waits for the GPU {times} times, {where}")
    if waited:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

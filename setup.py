"""Build of fastxm._C: C++ always, CUDA where nvcc is, never torch.

Environment:
    FASTXM_CUDA=0|1      leave the CUDA half out, or insist on it (default: built where nvcc is)
    FASTXM_CUDA_ARCHS    e.g. "80;90a" (default: the GPU's own, else 80 and 90a, plus PTX)
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    wanted = os.environ.get("FASTXM_CUDA", "")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    # the nvcc on PATH may be a script that stands outside its toolkit
    beside = Path(nvcc).resolve().parent.parent if nvcc else None
    for home in (
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        beside,
        "/usr/local/cuda",
    ):
        if home and (Path(home) / "bin" / "nvcc").exists() and cudart(Path(home)):
            return Path(home)
    if wanted == "1":
        sys.exit("fastxm: FASTXM_CUDA=1 but no nvcc: put it on PATH or set CUDA_HOME")
    return None


def cudart(home: Path) -> Path | None:
    """The folder of the static CUDA runtime."""
    folders = (home / "lib64", *sorted(home.glob("targets/*/lib")), home / "lib")
    return next((path for path in folders if (path / "libcudart_static.a").exists()), None)


def cuda_archs() -> list[str]:
    """Compute capabilities to generate code for, such as ["80", "90a"]."""
    if archs := os.environ.get("FASTXM_CUDA_ARCHS"):
        return archs.replace(",", ";").replace(".", "").split(";")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    own = {cap.replace(".", "") for cap in found}
    return sorted("90a" if cap == "90" else cap for cap in own) or ["80", "90a"]


def gencode(archs: list[str]) -> list[str]:
    """nvcc flags: machine code for each architecture, PTX of the last plain one for later GPUs."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = next((arch for arch in reversed(archs) if arch.isdigit()), "80")
    return [*flags, f"-gencode=arch=compute_{plain},code=compute_{plain}"]


class NinjaBuild(build_ext):
    """Compiles and links through one build.ninja: parallel, and incremental in a checkout."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)

    def ninja_file(self, target: Path) -> str:
        home = cuda_home()
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        include = " ".join(f"-I{path}" for path in includes)
        cxx = os.environ.get("CXX", "c++")
        openmp = "" if platform.system() == "Darwin" else "-fopenmp"
        common = "-O3 -std=c++17 -fPIC -fvisibility=hidden"
        link = "-shared -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
        maths = "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
        cxxflags = f"{common} {maths} {openmp} -Wall {include}"
        rules = [
            f"cxxflags = {cxxflags}" + (" -DFASTXM_CUDA" if home else ""),
            "rule cxx\n  command = " + f"{cxx} $cxxflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
        ]
        libraries = openmp
        sources = [ROOT / "csrc/module.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
        builds = [(path, "cxx") for path in sources]
        if home:
            flags = " ".join(gencode(cuda_archs()))
            rules += [
                f"rule nvcc\n  command = {home}/bin/nvcc -O3 -std=c++17 -Xcompiler "
                f"-fPIC,-fvisibility=hidden --expt-relaxed-constexpr {flags} "
                f"-I{ROOT / 'csrc'} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc",
            ]
            libraries += f" -L{cudart(home)} -lcudart_static -ldl -lrt -lpthread"
            builds += [(path, "nvcc") for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        rules.append(f"rule link\n  command = {cxx} {link} $in {libraries} -o $out")
        objects = []
        for path, rule in builds:
            obj = "_".join(path.relative_to(ROOT).parts) + ".o"
            rules.append(f"build {obj}: {rule} {path}")
            objects.append(obj)
        rules.append(f"build {target}: link {' '.join(objects)}")
        return "\n".join(rules) + "\n"


setup(
    ext_modules=[Extension("fastxm._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)

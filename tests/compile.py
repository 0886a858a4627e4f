"""Compiles every Triton kernel and every .cu without a GPU, and reports what each one uses.

    python tests/compile.py [--json FILE]

Each module of kernels/ ends with COMPILES, a list of (kernel, signature, constants, options): the
jit function, {argument: type}, {constexpr argument: value}, {"num_warps": ..., "num_stages": ...}.
A type that ends in :16 is of multiples of 16, as addresses are. Options may name "archs" of their
own. A spill beyond ALLOWED_SPILLS bytes fails.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

ROOT = Path(__file__).parent.parent
TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = ("80", "90a")
ALLOWED_SPILLS = 0
CUBIN_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
PTXAS_USAGE = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def compile_triton() -> list[dict]:
    """One row for each kernel, configuration and architecture."""
    modules = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    modules.remove("__init__")
    with ProcessPoolExecutor() as pool:
        return list(chain.from_iterable(pool.map(compile_module, modules)))


def compile_module(name: str) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import sm_arch_from_capability
    from triton.compiler import ASTSource

    rows = []
    module = importlib.import_module(f"fastxm.kernels.{name}")
    for kernel, signature, constants, options in module.COMPILES:
        options = dict(options)
        full = {**signature, **dict.fromkeys(constants, "constexpr")}
        ordered = {name: full[name].removesuffix(":16") for name in kernel.arg_names}
        whole = [i for i, name in enumerate(kernel.arg_names) if full[name].endswith(":16")]
        aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
        source = ASTSource(kernel, ordered, constexprs=constants, attrs=aligned)
        for arch in options.pop("archs", TRITON_ARCHS):
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            usage = {"shared": built.metadata.shared, **cubin_usage(built.asm["cubin"])}
            values = {k: str(v) for k, v in constants.items()}
            sm = sm_arch_from_capability(arch)
            head = {"kernel": f"{name}.{kernel.__name__}", "arch": sm, "constants": values}
            rows.append({**head, **options, **usage})
    return rows


def cubin_usage(cubin: bytes) -> dict:
    """Registers and local memory (spills) of a cubin, by cuobjdump where there is one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run(
            [cuobjdump(), "-res-usage", file.name], capture_output=True, text=True
        )
    match = CUBIN_USAGE.search(found.stdout + found.stderr)
    if match is None:
        raise RuntimeError(f"cuobjdump told nothing: {found.stdout}{found.stderr}")
    registers, stack, _, local = map(int, match.groups())
    return {"registers": registers, "spills": stack + local}


def cuobjdump() -> str:
    """The one that triton ships, else the toolkit's."""
    import triton

    shipped = list(Path(triton.__file__).parent.rglob("cuobjdump"))
    return str(shipped[0]) if shipped else "cuobjdump"


def compile_cuda() -> list[dict]:
    """One row for each kernel of each .cu and architecture; shared memory asked for at a launch
    is not in it."""
    rows = []
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for arch in CUDA_ARCHS:
            command = ["nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v",
                       f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}",
                       "-c", str(path), "-o", os.devnull]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{path.name} does not compile for sm_{arch}:\n{done.stderr}")
            for name, sm, *numbers in PTXAS_USAGE.findall(done.stderr):
                stack, stores, loads, registers, shared = (int(n or 0) for n in numbers)
                rows.append({"kernel": f"{path.stem}.cu:{name}", "arch": f"sm_{sm}",
                             "registers": registers, "stack": stack, "spills": stores + loads,
                             "shared": shared})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = compile_triton() + compile_cuda()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        usage = f"{row['registers']:4} registers {row['spills']:5} B spilled"
        print(f"{row['arch']:7} {usage}  {row['kernel']}")
    spilled = [row for row in rows if row["spills"] > ALLOWED_SPILLS]
    if not rows or spilled:
        sys.exit(f"{len(spilled)} of {len(rows)} kernels spill more than {ALLOWED_SPILLS} bytes")
    print(f"{len(rows)} kernels compiled, none spills")


if __name__ == "__main__":
    main()

"""fastxm: cross-modal generators, contrastive losses, kernel MMD and modulation on fused kernels.

C++ on CPUs; Triton and CUDA on GPUs.
"""

from importlib import import_module, metadata
from typing import Any

__version__ = metadata.version("fastxm")

HOMES = {
    "XMCGAN": "fastxm.models.xmcgan",
    "XMCGANConfig": "fastxm.models.xmcgan",
    "CrossModalAutoencoder": "fastxm.models.selfsup",
    "CrossModalConfig": "fastxm.models.selfsup",
    "MirrorGAN": "fastxm.models.mirrorgan",
    "MirrorGANConfig": "fastxm.models.mirrorgan",
    "DAMSM": "fastxm.encoders.damsm",
    "STREAM": "fastxm.models.stream",
    "LAFITE": "fastxm.models.lafite",
    "LAFITEConfig": "fastxm.models.lafite",
    "VDL": "fastxm.models.vdl",
    "VDLConfig": "fastxm.models.vdl",
    "DualEncoder": "fastxm.encoders.dual",
}
MODULES = ("data", "encoders", "evaluation", "losses", "models", "nn", "ops", "training")

__all__ = ["__version__", *HOMES, *MODULES]


def __getattr__(name: str) -> Any:
    # what is not asked for is not imported: `import fastxm` stays fast
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name in MODULES:
        return import_module(f"fastxm.{name}")
    raise AttributeError(f"module 'fastxm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

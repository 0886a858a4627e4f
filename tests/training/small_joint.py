"""LAFITE and VDL small enough for tests."""

import torch

from fastxm.encoders.frozen import Looks
from fastxm.models.lafite import LAFITEConfig
from fastxm.models.vdl import VDLConfig
from fastxm.training.embeddings import Embeddings
from fastxm.training.lafite import LAFITERecipe, LAFITETraining
from fastxm.training.trainer import LoopConfig
from fastxm.training.vdl import VDLRecipe, VDLTraining

TINY = {"image_size": 16, "embedding": 6, "z_dim": 4, "w_dim": 4, "mapping_layers": 1,
        "channel_base": 64, "channel_max": 4, "hidden": 8}  # fmt: skip
LOOP = LoopConfig(steps=7, log_every=1, sample_every=4, checkpoint_every=3)


def common(data, clip, **fields):
    plain = {"data": str(data), "encoder": str(clip), "batch_size": 4, "samples": 3,
             "device": "cpu", "r1_every": 2, "path_every": 2,
             "flip": True, "loop": LOOP}  # fmt: skip
    return {**plain, **fields}


def vdl(data, clip, model=None, **fields) -> VDLRecipe:
    config = VDLConfig(**{**TINY, "evidence_width": 8, **(model or {})})
    steps = {"adversarial_steps": 2, "posterior_steps": 3}
    return VDLRecipe(VDLTraining(model=config, **common(data, clip, **{**steps, **fields})))


def lafite(data, clip, model=None, **fields) -> LAFITERecipe:
    config = LAFITEConfig(**{**TINY, **(model or {})})
    return LAFITERecipe(LAFITETraining(model=config, **common(data, clip, **fields)))


def built(recipe):
    recipe.build()
    return recipe, next(iter(recipe.batches))


def state(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(network, before) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def prepare(patch):
    """Everything in float64: what Adam's first steps, signs, are of does not hang on rounding."""
    torch.set_default_dtype(torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    of_data, load = Embeddings.__init__, Looks.load

    def embed(self, dataset, encoder, **options):
        of_data(self, dataset, encoder.to(torch.float32), **options)  # of features that are cached
        encoder.to(torch.float64)
        for name in ("image", "evidence", "centre", "text"):
            setattr(self, name, getattr(self, name).double())

    def widened(self):
        load(self)
        self._encoders["image"].to(torch.float64)

    patch.setattr(Embeddings, "__init__", embed)
    patch.setattr(Looks, "load", widened)

"""Models turned to another dtype as a whole, model.to(torch.bfloat16), still draw the same."""

import pytest
import test_mirrorgan
import test_selfsup
import test_vdl
import test_xmcgan
import torch

MODELS = {
    "xmcgan": test_xmcgan.tiny,
    "mirrorgan": test_mirrorgan.tiny,
    "selfsup": test_selfsup.small,
    "vdl": test_vdl.tiny,
}
TOLERANCE = {torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generate(name, dtype):
    captions = ["a red apple", "frog"]
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = model.generate(captions, seed=0)
    after = model.to(dtype).generate(captions, seed=0)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[dtype])

"""The same training on a GPU; skipped without one."""

import pytest
import torch

from dinoengine.engine import SSLTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _losses(cfg, device, out, *opts):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.DEVICE", device, "OUTPUT_DIR", out, "LOG.PERIOD", 1, *opts])
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return torch.tensor([value for value, _ in trainer.storage.history("total_loss").values()])


@pytest.mark.parametrize(("opts", "tolerance"), [((), 1e-3), (("SOLVER.AMP.ENABLED", True), 3e-2)])
def test_losses_on_the_gpu_equal_those_on_the_cpu(tiny_cfg, tmp_path, opts, tolerance):
    steps = ("SOLVER.MAX_ITER", 4, "FLOAT32_PRECISION", "highest")
    on_cpu = _losses(tiny_cfg, "cpu", str(tmp_path / "cpu"), *steps)
    on_gpu = _losses(tiny_cfg, "cuda", str(tmp_path / "gpu"), *steps, *opts)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=tolerance, atol=tolerance)


def test_fp16_with_the_scaler_trains_and_resumes(tiny_cfg, tmp_path):
    fp16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16", "SOLVER.MAX_ITER", 4)
    losses = _losses(tiny_cfg, "cuda", str(tmp_path), *fp16)
    assert torch.isfinite(losses).all()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["trainer"]["grad_scaler"]["scale"] > 0

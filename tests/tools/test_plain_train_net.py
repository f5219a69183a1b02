"""tools/plain_train_net.py is the same training as the trainer with its hooks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dinoengine.engine import SSLTrainer

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = importlib.util.spec_from_file_location("plain_train_net", ROOT / "tools" / "plain_train_net.py")
assert SPEC is not None
assert SPEC.loader is not None
plain_train_net = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain_train_net)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_both_give_equal_losses_and_weights(tiny_cfg, tmp_path, centering) -> None:
    cfg = tiny_cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 5, "LOG.PERIOD", 1, "MODEL.VIT.DROP_PATH_RATE", 0.3])
    cfg.MODEL.LOSS.CENTERING = centering
    cfg.OUTPUT_DIR = str(tmp_path / "plain")
    model, losses = plain_train_net.train(cfg)

    cfg.OUTPUT_DIR = str(tmp_path / "trainer")
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    logged = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert logged == losses
    assert len(set(losses)) == 5
    for (name, mine), theirs in zip(model.state_dict().items(), trainer.bare_model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name

"""Lightning's Trainer trains a wrapped network as a loop by hand does, to the last bit."""

from __future__ import annotations

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import BATCH, EPOCHS, MAX_NORM, assert_same, examples, model, train_by_hand

import dfa_kernels as dfa

OPTIMIZERS = {
    "SGD": lambda own: torch.optim.SGD(own.parameters(), lr=0.5, momentum=0.9),
    "AdamW": lambda own: torch.optim.AdamW(own.parameters(), lr=0.01),
    "fused SGD": lambda own: dfa.optim.SGD(own, lr=0.5, momentum=0.9),
    "fused AdamW": lambda own: dfa.optim.AdamW(own, lr=0.01),
}


class Classifier(lightning.LightningModule):
    def __init__(self, seed, optimizer):
        super().__init__()
        self.model, self.optimizer = model(seed), optimizer

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.model)


def fit(module, folder, epochs=EPOCHS, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=MAX_NORM,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*examples()), BATCH), **options)
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_clipped_run(optimizer, tmp_path):
    module = Classifier(0, optimizer)
    fit(module, tmp_path)
    own = model()
    assert_same(module.model, train_by_hand(own, OPTIMIZERS[optimizer](own)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run(optimizer, tmp_path):
    fit(Classifier(0, optimizer), tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = Classifier(1, optimizer)
    fit(module, tmp_path, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    own = model()
    assert_same(module.model, train_by_hand(own, OPTIMIZERS[optimizer](own)))

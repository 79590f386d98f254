"""Hugging Face's Trainer trains a wrapped network as a loop by hand does, to the last bit, and saves safetensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training import BATCH, EPOCHS, MAX_NORM, assert_same, examples, model, train_by_hand
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments


class Config(PretrainedConfig):
    model_type = "dfa_kernels_test"


class Classifier(PreTrainedModel):
    """As a user writes it: the wrapped network within a model that returns its loss. Its seed is not in its config."""

    config_class = Config

    def __init__(self, config, seed=1):
        super().__init__(config)
        self.model = model(seed)
        self.post_init()

    def _init_weights(self, module):
        """Those that the network was made with stay."""

    def forward(self, input, labels):
        logits = self.model(input)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def loss_of(logits, labels, num_items_in_batch=None):
    return F.cross_entropy(logits, labels)


def alone(seed):
    own = model(seed)
    # Its forward takes any keyword, for those of its network; the Trainer takes that for its own, too.
    own.accepts_loss_kwargs = False
    return own


# How the Trainer is handed a wrapped network: (what it trains, its options, where the network is in that).
WAYS = {
    "alone": (alone, {"compute_loss_func": loss_of}, lambda module: module),
    "within": (lambda seed: Classifier(Config(), seed), {}, lambda module: module.model),
}


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def train(way, seed, folder, resume=None):
    make, options, network = WAYS[way]
    module = make(seed)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        num_train_epochs=EPOCHS,
        max_grad_norm=MAX_NORM,
        save_strategy="epoch",
        use_cpu=True,
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    optimizer = adamw(module)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    data = [{"input": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    Trainer(module, arguments, train_dataset=data, optimizers=(optimizer, constant), **options).train(resume)
    return network(module)


def by_hand(epochs=EPOCHS):
    own = model()
    return train_by_hand(own, adamw(own), epochs)


@pytest.mark.parametrize("way", WAYS)
def test_a_clipped_run_and_its_checkpoints(way, tmp_path):
    assert_same(train(way, 0, tmp_path), by_hand())
    for epoch, folder in enumerate(sorted(tmp_path.glob("checkpoint-*")), start=1):
        make, _, network = WAYS[way]
        loaded = make(1)
        loaded.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        assert_same(network(loaded), by_hand(epoch))
    assert epoch == EPOCHS


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run(way, tmp_path):
    train(way, 0, tmp_path)
    first, _ = sorted(tmp_path.glob("checkpoint-*"))
    assert_same(train(way, 1, tmp_path / "resumed", resume=first), by_hand())


def test_from_pretrained(tmp_path):
    train("within", 0, tmp_path)
    _, last = sorted(tmp_path.glob("checkpoint-*"))
    assert_same(Classifier.from_pretrained(last).model, by_hand())

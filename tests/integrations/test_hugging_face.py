"""Hugging Face's Trainer trains a wrapped network as a loop by hand does, to the last bit, and saves safetensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training import BATCH, EPOCHS, MAX_NORM, assert_same, examples, model, train_by_hand
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import dfa_kernels as dfa


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


def gpt2(activation):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8, activation_function=activation,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return dfa.DFA(GPT2LMHeadModel(config), output=lambda returned: returned.logits)


@pytest.mark.parametrize("rows", [3, 7], ids=["fewer rows than positions", "as many"])
def test_gpt2_has_a_tap_in_every_block(rows):
    """Its layers are products by addmm, and its activation a formula: gradients are those with PyTorch's own."""
    formula, own = gpt2("gelu_new"), gpt2("gelu_pytorch_tanh")
    tokens = torch.randint(50, (rows, 7), generator=torch.Generator().manual_seed(1))
    for model_ in (formula, own):
        F.cross_entropy(model_(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert [(tap.name, tap.shape) for tap in formula.taps] == [(f"transformer.h.{i}.mlp.c_fc", (64,)) for i in (0, 1)]
    for p, q in zip(formula.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)

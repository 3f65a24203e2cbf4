"""A real BERT of a few thousand parameters, random tokens, and trainers of it: aligned ones and a plain one."""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gradalign import rules
from gradalign.integrations.transformers import AlignedTrainer

LABELS = 3


def bert(seed=0, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def rows(number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 40, (8,), generator=generator),
            "labels": n % LABELS,
            "teacher": torch.softmax(2 * torch.randn(LABELS, generator=generator, dtype=dtype), -1),
            "turned": (n + 1) % LABELS,  # against the labels, so that losses conflict
        }
        for n in range(number)
    ]


def losses_of(model, inputs):
    outputs = model(input_ids=inputs["input_ids"])
    logits = outputs.logits
    losses = {
        "ce": F.cross_entropy(logits, inputs["labels"]),
        "kd": F.cross_entropy(logits, inputs["teacher"]),
        "turned": 0.5 * F.cross_entropy(logits, inputs["turned"]),
    }
    return losses, outputs


class Aligned(AlignedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        losses, outputs = losses_of(model, inputs)
        return (losses, outputs) if return_outputs else losses


class Plain(Trainer):
    """What one would write without gradalign: the sum."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # compute_loss returns means over the micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, outputs = losses_of(model, inputs)
        loss = sum(losses.values())
        return (loss, outputs) if return_outputs else loss


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**defaults | options)


def parameters(trainer):
    return [p.detach().clone() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]


def trained(kind, folder, *, model=None, number=16, trainer_options=None, resume=None, **options):
    """Return a trainer of this kind that has trained."""
    model = bert() if model is None else model
    dtype = next(model.parameters()).dtype
    trainer = kind(
        model=model, args=arguments(folder, **options), train_dataset=rows(number, dtype), **(trainer_options or {})
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def summed(outputs, labels, num_items_in_batch=None):
    """A ``compute_loss_func``: sums over the number of items that the Trainer gives."""
    losses = {"ce": labels, "turned": (labels + 1) % LABELS}
    return {
        name: F.cross_entropy(outputs.logits, of_group, reduction="sum") / num_items_in_batch
        for name, of_group in losses.items()
    }


RANKED = {
    "pcgrad": (Aligned, {"rule": "pcgrad"}),
    "ga-soft": (Aligned, {"rule": "ga-soft"}),
    "compute_loss_func": (AlignedTrainer, {"rule": rules.Constant([2.0, 0.5]), "compute_loss_func": summed}),
}


def train_ranked(case, folder, size):
    """Train on this rank's part of each batch, with micro-batches."""
    kind, options = RANKED[case]
    trainer = trained(
        kind,
        folder,
        trainer_options=options,
        per_device_train_batch_size=8 // size,
        gradient_accumulation_steps=2,
        remove_unused_columns=case == "compute_loss_func",
        ddp_backend="gloo" if size > 1 else None,
        optim="sgd",
    )
    return {
        "parameters": parameters(trainer),
        "history": trainer.state.log_history,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def train_on_ranks(rank, size, folder):
    """What ``processes.run`` runs: every case in turn, with the variables that a launcher sets."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
    os.environ.update({name: str(value) for name, value in launched.items()})
    return {case: train_ranked(case, f"{folder}/{rank}", size) for case in RANKED}

"""A run of a tiny encoder on rows of random tokens, in memory: the label is whether a row's second token is large."""

from __future__ import annotations

import torch
import transformers

from gradalign.multiexit import MultiExitEncoder, training
from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.evaluation import Costs
from gradalign.multiexit.inference import evaluating
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import train
from gradalign.multiexit.workloads import Workload

AN_EPOCH = 3
BATCH = 8


def config_of(family="bert", layers=4):
    if family == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=32, dim=16, n_layers=layers, n_heads=2, hidden_dim=16, max_position_embeddings=8
        )
    more = {"embedding_size": 8} if family in ("albert", "electra") else {}
    return transformers.AutoConfig.for_model(
        family, vocab_size=32, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=10, **more,
    )  # fmt: skip


def encoder(family="bert", layers=4, **options):
    """A network whose weights are larger than pretrained ones, so that every part of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MultiExitEncoder.from_config(config_of(family, layers), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 32, (count, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (count, 1), generator=generator)).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, (ids[:, 1] > 18).long()


class Tokens(Workload):
    """24 rows to train on, as many held out."""

    main = "accuracy"

    def __init__(self, config, layers=4, family="bert"):
        self.config, self.device, self.steps_an_epoch = config, torch.device("cpu"), AN_EPOCH
        self.shape = {"layers": layers, "family": family}
        self.splits = {name: rows(AN_EPOCH * BATCH, k) for k, name in enumerate(("train", "held_out", "test"))}

    def make_model(self):
        return encoder(**self.shape)

    def make_optimizer(self, parameters, learning_rate):
        return torch.optim.AdamW(parameters, learning_rate, weight_decay=0.1)

    def learning_rate(self, step, steps):
        return self.config.learning_rate * (1 - step / steps)

    def batch(self, step, rank, ranks):
        inputs, labels = self.splits["train"]
        part = slice(step % AN_EPOCH * BATCH, (step % AN_EPOCH + 1) * BATCH)
        return {name: tensor[part] for name, tensor in inputs.items()}, labels[part], 1.0

    def layers(self, model):
        return model.layer_blocks()

    def trunk(self, model):
        return list(model.backbone.parameters())

    @torch.no_grad()
    def logits(self, model, split):
        inputs, labels = self.splits[split]
        with evaluating(model):
            return model(**inputs), labels

    def scores(self, logits, labels):
        return {"accuracy": (logits.argmax(-1) == labels).double().mean(1)}

    def rows(self, split, count):
        raise NotImplementedError

    def depth(self, model):
        return model.exit_layers[-1]

    def whole(self):
        return self.shape["layers"], 1.0

    def costs(self, model):
        return Costs(model.exit_macs(6), [0.0] * (model.num_exits - 1))

    def save(self, model, folder):
        model.save_pretrained(folder / "model")

    def load(self, folder):
        return MultiExitEncoder.from_pretrained(folder / "model")


def config(method, **changed):
    settings = {"epochs": 2, "learning_rate": 1e-3, "patience": None, **changed}
    return TextConfig(task="rte", backbone="none", method=method, **settings)


def trained(folder, method, work=Tokens, **changed):
    run = Run.create(folder, config(method, **changed))
    work = work(run.config)
    train(run, work)
    return run, work


def states(monkeypatch):
    """Return a list that fills with what each stage began with: network, names of what trains, teacher."""
    seen = []
    enter = training._Training._enter

    def entering(self, *arguments):
        enter(self, *arguments)
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        seen.append((state, {n for n, p in self.model.named_parameters() if p.requires_grad}, self.teacher))

    monkeypatch.setattr(training._Training, "_enter", entering)
    return seen

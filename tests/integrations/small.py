"""A small model with three losses that conflict, its data, and what the tests of all integrations share."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


class Net(nn.Module):
    """Returns its losses. PCGrad's random orders count from three groups on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(6, 8)
        self.first = nn.Linear(8, 3)
        self.second = nn.Linear(8, 2)

    def forward(self, x, labels):
        hidden = torch.tanh(self.trunk(x))
        return {
            "first": F.cross_entropy(self.first(hidden), labels),
            "second": F.cross_entropy(self.second(hidden), (labels + 1) % 2),
            "third": F.cross_entropy(self.first(hidden), (labels + 1) % 3),
        }


def data(rows=20):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, torch.arange(rows) % 3)


def batches(size=4, rows=20):
    x, labels = data(rows).tensors
    return list(zip(x.split(size), labels.split(size), strict=True))


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def run_page(name, folder, monkeypatch):
    """Run the program of a page in a folder, as a user would."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own advice
        exec(compile(program, name, "exec"), {"__name__": "__main__"})


def import_without(packages, module, monkeypatch):
    """Import the module as if the packages were not installed."""
    loaded = [name for name in sys.modules if any(f"{name}.".startswith(f"{package}.") for package in packages)]
    for name in (*loaded, module):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, packages[0], None)
    importlib.import_module(module)

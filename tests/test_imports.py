"""`import gradalign` needs torch alone, and a missing extra is named with what brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = ("numpy", "sklearn", "matplotlib", "safetensors", "tqdm", "scipy", "transformers", "triton")


def run(code, missing):
    block = f"import sys\nfor name in {list(missing)!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)


def test_the_core_and_the_networks_need_torch_alone():
    code = """
import torch
from gradalign import GradientAligner
from gradalign.multiexit import MultiExitResNet, early_exit, objectives, policies
model = MultiExitResNet(depth=8, in_channels=1)
optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "ga-soft")
logits = model(torch.zeros(2, 1, 8, 8))
labels = torch.tensor([0, 1])
losses = {"ce": objectives.weighted_cross_entropy(logits, labels), "kd": objectives.mutual_distillation(logits)}
optimizer.backward(losses)
optimizer.step()
early_exit(model, torch.zeros(2, 1, 8, 8), policies.Entropy(0.1))
"""
    done = run(code, EXTRAS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "module"),
    [
        ("numpy", "gradalign.multiexit.data"),
        ("matplotlib", "gradalign.multiexit.figures"),
        ("safetensors", "gradalign.multiexit.runs"),
        ("tqdm", "gradalign.multiexit.training"),
    ],
)
def test_a_missing_extra_is_named(missing, module):
    done = run(f"import {module}", [missing, f"{missing}.torch", f"{missing}.figure"])
    assert (
        f'needs the package `{missing}`, which is not installed; pip install "gradalign[multiexit]" brings it'
        in done.stderr
    )


def test_the_command_line_says_it_in_one_line():
    done = run("from gradalign.cli import main; sys.exit(main(['train']))", ["sklearn", "sklearn.datasets"])
    assert done.returncode == 1
    assert done.stderr.strip().startswith("gradalign: This needs the package `scikit-learn`")

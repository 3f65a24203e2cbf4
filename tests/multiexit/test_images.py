from __future__ import annotations

import torch
from torch.testing import assert_close

from gradalign.multiexit import MultiExitResNet
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.data import load
from gradalign.multiexit.images import ImageWorkload
from gradalign.multiexit.metrics import exit_macs


def work(**changed):
    return ImageWorkload(ImageConfig(**{"depth": 8, "exits": (1, 2), **changed}), torch.device("cpu"), load("digits"))


def test_weights_come_back(tmp_path):
    workload = work()
    model = workload.make_model().to(memory_format=torch.channels_last)
    model(torch.randn(4, 1, 8, 8))  # BatchNorm's buffers move
    workload.save(model, tmp_path)
    again = workload.load(tmp_path)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


def test_an_epoch_has_every_row_once():
    workload = work(batch_size=100)
    labels = torch.cat([workload.batch(step, 0, 1)[1] for step in range(workload.steps_an_epoch)])
    assert torch.equal(labels.bincount(), workload.data.train.labels.bincount())
    assert not torch.equal(workload.batch(0, 0, 1)[1], workload.batch(workload.steps_an_epoch, 0, 1)[1])


def test_the_trunk_is_what_no_exit_holds():
    workload = work()
    model = workload.make_model()
    trunk = {id(p) for p in workload.trunk(model)}
    exits = {id(p) for p in model.heads.parameters()}
    assert trunk | exits == {id(p) for p in model.parameters()}
    assert not trunk & exits


def test_logits_leave_the_mode_and_come_in_the_rows_order():
    workload = work()
    model = workload.make_model().train()
    logits, labels = workload.logits(model, "test")
    assert model.training
    assert logits.shape == (3, 359, 10)
    assert torch.equal(labels, workload.data.test.labels)
    model.eval()
    with torch.no_grad():
        expected = model(workload.data.inputs(workload.data.test.images[300:310]))
    assert_close(logits[:, 300:310], expected)


def test_costs_are_of_exits_and_heads():
    workload = work()
    model = workload.make_model()
    costs = workload.costs(model)
    assert costs.exits == exit_macs(model, 8)
    assert costs.heads == [16 * 16 * 10, 32 * 16 * 10]
    assert costs.bare == exit_macs(MultiExitResNet(depth=8, in_channels=1, exits=[]), 8)[0]

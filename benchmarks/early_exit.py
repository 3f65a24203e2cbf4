"""How many rows a second early exiting answers, against batch size and speed-up, and when to drop rows that left.

    python benchmarks/early_exit.py --out benchmarks/results    ResNet-56 with 27 exits, a BERT of 6 x 384
    python benchmarks/early_exit.py --quick                     smaller ones, few rows

Measured in turn, on the same rows in batches of each size: *full depth*, which runs every layer and the last head
alone; and ``early_exit`` with a policy calibrated to each wanted speed-up, a threshold on the entropy of logits over
each exit's temperature. Batches of one are the loop over single rows that DeeBERT and PABEE use. Weights are random,
and heads scaled so that exits differ in how sure they are; the policy is calibrated on the rows that are measured. *In
time* is against full depth at the same batch size, *in layers* what the policy saves: heads, policy and the dropping of
rows stand between the two.

The second table compares dropping rows *at once*, at the exit where they leave, as ``early_exit`` does, with dropping
them once *a quarter* of the rows still computed has left, by threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import command_line
import plots
import torch
from provenance import record
from tables import table
from timing import Figures, measure
from torch import Tensor, nn
from transformers import BertConfig

from gradalign.multiexit import MultiExitEncoder, MultiExitResNet, early_exit, metrics, policies
from gradalign.multiexit.inference import Decision, Inputs, MultiExitModel, Policy, Walk, every_exit

ROUNDS = 7
BATCHES = (1, 8, 32)
SPEED_UPS = (1.5, 2.0, 3.0)
COMPACTED = 32
"""The batch on which ways of dropping rows are compared."""
THREADS = (1, 2)
CLASSES = 10
FULL = "full depth"


@dataclass
class Workload:
    """A network and rows for it.

    Attributes:
        title: What it is.
        model: In evaluation mode.
        inputs: Of as many rows as the largest batch.
    """

    title: str
    model: MultiExitModel
    inputs: Inputs

    def batch(self, rows: slice) -> Inputs:
        """Return some of the rows."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[rows]
        return {name: tensor[rows] for name, tensor in self.inputs.items()}


def resnet(rows: int, depth: int = 56, side: int = 32, device: str = "cpu") -> Workload:
    """Return a ResNet with an exit after every block, its normalisation with statistics of random images."""
    torch.manual_seed(0)
    model = MultiExitResNet(depth, CLASSES).to(device)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, side, side, device=device))
    heads = [next(layer for layer in head.modules() if isinstance(layer, nn.Linear)) for head in model.heads]
    _spread(heads)
    return Workload(f"ResNet-{depth}", model.eval(), torch.randn(rows, 3, side, side, device=device))


def encoder(rows: int, width: int = 384, length: int = 64, device: str = "cpu") -> Workload:
    """Return a BERT of 6 layers with exits on the first token, and sentences of ``length`` / 4 to ``length`` words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": max(1, width // 32), "intermediate_size": 4 * width}
    config = BertConfig(vocab_size=1000, num_hidden_layers=6, **sizes)
    model = MultiExitEncoder.from_config(config, num_labels=CLASSES, exit="linear").to(device)
    _spread([head.linear for head in model.heads])
    lengths = torch.randint(-(-length // 4), length + 1, (rows, 1))
    mask = (torch.arange(length) < lengths).long().to(device)
    inputs = {"input_ids": torch.randint(1000, (rows, length), device=device) * mask, "attention_mask": mask}
    return Workload(f"BERT of 6 x {width}, {length} words or fewer", model.eval(), inputs)


def _spread(heads: Sequence[nn.Linear]) -> None:
    """Scale the heads, the deeper the more, so that exits and rows differ in how sure they are."""
    with torch.no_grad():
        for exit, head in enumerate(heads, 1):
            head.weight.mul_(1 + 4 * exit / len(heads))


@torch.no_grad()
def stored_logits(workload: Workload) -> Tensor:
    """Return every exit's logits of all rows, (M, N, C)."""
    return every_exit(workload.model, workload.inputs)


def calibrated(logits: Tensor, wanted: float) -> Policy:
    """Return an entropy policy at the wanted speed-up, with temperatures for labels that each exit draws itself."""
    generator = torch.Generator(logits.device).manual_seed(0)
    drawn = [torch.multinomial(exit.softmax(-1), 1, generator=generator).squeeze(-1) for exit in logits]
    fitted = [policies.calibrate_temperatures(exit[None], labels) for exit, labels in zip(logits, drawn, strict=True)]
    temperatures = torch.cat(fitted)
    return policies.calibrate(policies.Calibrated(policies.Entropy(0.0), temperatures), logits, wanted)


def late_exit(model: MultiExitModel, inputs: Inputs, policy: Policy, share: float = 0.25) -> Decision:
    """Do as ``early_exit``, but drop rows only once a share of those still computed has left.

    Args:
        model: With a hidden state of one tensor or several by name; in evaluation mode.
        inputs: What ``model.start`` takes.
        policy: Who leaves where.
        share: Of the rows that are computed; 0 drops at once.
    """
    with torch.no_grad():
        hidden = model.start(inputs)
        first = hidden if isinstance(hidden, Tensor) else next(iter(hidden.values()))
        walk = Walk(policy, model.num_exits, len(first), first.device)
        there = walk.rows  # where the rows that are left lie in the hidden state
        computed = len(first)
        for exit in range(1, model.num_exits + 1):
            hidden, logits = model.advance(hidden, exit)
            if not walk.looks():
                walk.pass_by()
                continue
            there = there[walk.visit(logits[there])]
            if walk.finished:
                break
            if len(there) < computed and computed - len(there) >= share * computed:
                kept = {name: tensor[there] for name, tensor in _named(hidden).items()}
                hidden = kept[""] if isinstance(hidden, Tensor) else kept
                computed = len(there)
                there = torch.arange(computed, device=there.device)
    return walk.decision()


def _named(hidden: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": hidden} if isinstance(hidden, Tensor) else hidden


@dataclass
class Rows:
    """A call that answers ``steps`` rows, so that its time counts for one of them."""

    call: Callable[[], object]
    steps: int

    def __call__(self) -> object:
        """Answer them."""
        return self.call()


def throughput(
    workload: Workload, batches: Sequence[int], speed_ups: Sequence[float], rounds: int, device: str
) -> dict[str, Figures]:
    """Return the figures of every way at every batch size, all on the same rows: rows a second, and speed-ups."""
    model, logits = workload.model, stored_logits(workload)
    M, N, _ = logits.shape
    ways: dict[str, Policy] = {FULL: policies.Budget(M)}
    ways |= {f"early exit at {wanted:g}x": calibrated(logits, wanted) for wanted in speed_ups}
    calls, ratios = {}, {}
    for size in batches:
        split = [workload.batch(slice(start, start + size)) for start in range(0, N, size)]
        for way, policy in ways.items():
            calls[named(way, size)] = Rows(partial(answer, model, split, policy), N)
            ratios[named(way, size)] = {
                "speed-up in time": f"of {named(FULL, size)}",
                "speed-up over batches of one": f"of {named(way, 1)}",
            }
    references = [name for name in calls if name.startswith(FULL) or name.endswith(named("", 1))]
    measured = measure(calls, rounds, device, references)
    for name, figures in measured.items():
        if "failed" in figures:
            continue
        kept = {"seconds", "rounds"}
        times = {said: 1 / figures[of] for said, of in ratios[name].items() if of in figures}
        for key in figures.keys() - kept:
            del figures[key]
        policy = ways[name.rpartition(",")[0]]
        in_layers = metrics.speed_up(policy(logits), M)
        figures |= {"rows a second": 1 / figures["seconds"], "speed-up in layers": in_layers, **times}
    return measured


def named(way: str, size: int) -> str:
    """Return the name of a way at a batch size."""
    return f"{way}, batch {size}"


def answer(model: MultiExitModel, batches: Sequence[Inputs], policy: Policy) -> None:
    """Answer every batch."""
    for batch in batches:
        early_exit(model, batch, policy)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compaction(workload: Workload, speed_ups: Sequence[float], rounds: int, device: str) -> list[dict[str, Any]]:
    """Return the figures of dropping rows at once and late, by threads and speed-up."""
    size = min(COMPACTED, len(next(iter(_named(workload.inputs).values()))))
    batch, model = workload.batch(slice(size)), workload.model
    logits = stored_logits(workload)[:, :size]
    entries = []
    for number in THREADS:
        for wanted in speed_ups:
            policy = calibrated(logits, wanted)
            calls = {
                "at once": Rows(lambda policy=policy: late_exit(model, batch, policy, share=0), size),
                "a quarter": Rows(lambda policy=policy: late_exit(model, batch, policy), size),
            }
            with threads(number):
                measured = measure(calls, rounds, device, ("at once",))
            entries.append({"threads": number, "speed-up": wanted, "batch": size, "ways": measured})
    return entries


def throughput_table(measured: Mapping[str, Figures]) -> str:
    """Return the first table: for each way and batch size rows a second and the speed-ups."""
    columns = ("speed-up in layers", "speed-up in time", "speed-up over batches of one")
    rows = []
    for name, figures in measured.items():
        way, _, size = name.rpartition(", batch ")
        if "failed" in figures:
            rows.append([way, size, figures["failed"], *("-" for _ in columns)])
            continue
        speeds = [f"{figures[column]:.2f}" if column in figures else "-" for column in columns]
        rows.append([way, size, f"{figures['rows a second']:.1f}", *speeds])
    return table(["", "batch", "rows a second", *columns], rows)


def compaction_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the second table: milliseconds a row, and late dropping's time over that of dropping at once."""
    rows = []
    for entry in entries:
        ways: Mapping[str, Figures] = entry["ways"]
        cells = [
            figures["failed"] if "failed" in figures else f"{1e3 * figures['seconds']:.2f}" for figures in ways.values()
        ]
        ratio = ways["a quarter"].get("of at once")
        rows.append(
            [f"{entry['speed-up']:g}x", str(entry["threads"]), *cells, "-" if ratio is None else f"{ratio:.3f}"]
        )
    return table(["speed-up", "threads", "at once, ms a row", "a quarter, ms a row", "ratio"], rows)


def curves(measured: Mapping[str, Figures]) -> dict[str, list[tuple[float, float]]]:
    """Return the plot's curves: each way's rows a second against the batch size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, figures in measured.items():
        if "rows a second" in figures:
            way, _, size = name.rpartition(", batch ")
            lines.setdefault(way, []).append((int(size), figures["rows a second"]))
    return lines


def main() -> None:
    """Measure, print the tables, write JSON and a plot where asked."""
    options = command_line.parser(__doc__, ROUNDS).parse_args()
    rounds = command_line.rounds(options)
    batches, speed_ups = ((1, 8), (2.0,)) if options.quick else (BATCHES, SPEED_UPS)
    sizes: list[dict[str, int]] = [{"depth": 14}, {"width": 64}] if options.quick else [{}, {}]
    results: dict[str, object] = {"benchmark": "early_exit", **record(options.device), "rounds": rounds}
    command_line.show(results)
    results["cases"] = cases = {}
    for make, size in zip((resnet, encoder), sizes, strict=True):
        workload = make(max(batches), device=options.device, **size)
        measured = throughput(workload, batches, speed_ups, rounds, options.device)
        dropped = compaction(workload, speed_ups, rounds, options.device)
        cases[workload.title] = {"throughput": measured, "compaction": dropped}
        print(f"\n{workload.title}:\n\n{throughput_table(measured)}\n\n{compaction_table(dropped)}", flush=True)
    if path := command_line.save(options, "early_exit", results):
        panels = {title: curves(case["throughput"]) for title, case in cases.items()}
        plots.curves(path, panels, ["rows in a batch"] * len(panels), "rows a second", log=True)


if __name__ == "__main__":
    main()

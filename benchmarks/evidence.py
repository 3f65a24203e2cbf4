"""What the methods of the GAML-BERT paper come to on real tasks with a small encoder, for docs/evidence.md.

    python benchmarks/evidence.py --backbone BACKBONE --data-dir GLUE --seeds 1 --out benchmarks/results
    python benchmarks/evidence.py --backbone BACKBONE --data-dir GLUE --no-train

BACKBONE is a folder with an encoder of 6 layers and its tokenizer, or such a name on the hub; GLUE holds SST-2, RTE and
MRPC as TSV. Trained are the methods of table 2 on the three tasks, and on SST-2 what can be set about gradient
alignment; runs lie in --runs, what is finished is taken as it is, and a stop loses nothing. Written are evidence.md
with all tables, evidence.json with how they were made and what each run came to, and the histograms of figure 3.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provenance import record, write

from gradalign.multiexit.configs import Config
from gradalign.multiexit.evaluation import at_speed_up, policy_of
from gradalign.multiexit.records import conflict_shares
from gradalign.multiexit.reproduce import PIECES, Order, reproduce
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.runs import Run
from gradalign.multiexit.workloads import judge_of

TASKS = ("sst-2", "mrpc", "rte")
METHODS = (
    "joint", "ml", "gaml-hard", "gaml-soft", "fastbert", "fastbert-ga", "deebert", "shallow-deep",
    "kd:anchored-pcgrad", "kd:pcgrad",
)  # fmt: skip
SETTINGS = {
    "max_train": 4000,
    "epochs": 3,
    "learning_rate": 5e-5,
    "alpha": 0.3,
    "exit": "mean",
    "precision": "bfloat16",
}
REDUCTIONS = ("mean", "sum")
ALIGNED: Mapping[str, tuple[str, Mapping[str, Any], Sequence[str]]] = {
    "ml": ("ml", {}, REDUCTIONS),
    "gaml-hard": ("gaml-hard", {}, REDUCTIONS),
    "gaml-soft": ("gaml-soft", {}, REDUCTIONS),
    "gaml-soft, --granularity layer": ("gaml-soft", {"granularity": "layer"}, REDUCTIONS),
    "gaml-soft, --granularity tensor": ("gaml-soft", {"granularity": "tensor"}, REDUCTIONS),
    "gaml-soft, --clamp": ("gaml-soft", {"clamp": True}, ("sum",)),  # of a mean no weight is below 0
    "kd:anchored-pcgrad": ("kd:anchored-pcgrad", {}, REDUCTIONS),
    "kd:pcgrad": ("kd:pcgrad", {}, REDUCTIONS),
    "kd:cagrad": ("kd:cagrad", {}, ("sum",)),
    "kd:aligned-mtl": ("kd:aligned-mtl", {}, ("sum",)),
}
"""What is set about the alignment on SST-2: a title to the method, the settings that are not SETTINGS, and which
reductions of the distillation it is tried with."""
SPEED_UP = 1.95
_SHOWN = (0, 2, -1)  # exits, in the table of settings


def variants(order: Order) -> dict[str, list[Config]]:
    """Return what is compared on the first task: joint training, and each setting by either reduction."""
    task = TASKS[0]
    return {"joint": order.each_seed("joint", task)} | {
        f"{title}, {reduction}": order.each_seed(method, task, **changed, reduction=reduction)
        for reduction in REDUCTIONS
        for title, (method, changed, reductions) in ALIGNED.items()
        if reduction in reductions
    }


def mean_score(run: Run) -> float:
    """Return the mean of the exits' scores on development rows, per cent."""
    return 100 * statistics.fmean(run.scores)


def early(run: Run) -> tuple[float, float]:
    """Return score, per cent, and speed-up in layers by entropy, set to the wanted speed-up on held-out rows."""
    held_out = run.logits("held_out")
    policy = policy_of("entropy", held_out)
    outcome = at_speed_up(policy, held_out[0], run.logits("test"), SPEED_UP, run.costs, judge_of(run.config))
    return 100 * outcome.score, outcome.speed_up


def conflicts(run: Run) -> tuple[float, float] | None:
    """Return the shares of steps that conflict and that are reversed, per cent; None with one loss."""
    shares = conflict_shares(run.metrics("step"))
    return None if shares is None else (100 * shares[0], 100 * shares[1])


def by_entropy(order: Order) -> Table:
    """Return the runs of table 2, all by one policy."""
    rows = []
    for method in METHODS:
        cells, speed_ups = [], []
        for task in TASKS:
            runs = order.finished(order.each_seed(method, task))
            found = [early(run) for run in runs]
            speed_ups += [speed_up for _, speed_up in found]
            cells += [
                Cell([mean_score(run) for run in runs], len(order.seeds)),
                Cell([score for score, _ in found], len(order.seeds)),
            ]
        rows.append((method, [*cells, Cell(speed_ups, len(order.seeds) * len(TASKS), None, 2, "runs")]))
    columns = [column for task in TASKS for column in (f"{task}, mean of exits", f"{task}, early")]
    return Table(
        "The same runs, all by entropy",
        ("method", *columns, "layers x"),
        rows,
        (
            "Scores on development rows, per cent: the mean of all exits, and of answers that leave early by entropy,"
            f" set to {SPEED_UP} on held-out rows. Mean ± deviation over the seeds.",
        ),
    )


def by_settings(order: Order) -> Table:
    """Return what each setting of the alignment comes to."""
    rows = []
    for title, configs in variants(order).items():
        runs = order.finished(configs)
        wanted = len(order.seeds)
        exits = list(zip(*(run.scores for run in runs), strict=True))
        found = [early(run) for run in runs]
        shares = [share for run in runs if (share := conflicts(run)) is not None]
        rows.append(
            (
                title,
                [
                    Cell([mean_score(run) for run in runs], wanted),
                    *(Cell([100 * score for score in exits[exit]] if runs else (), wanted) for exit in _SHOWN),
                    Cell([score for score, _ in found], wanted),
                    Cell([speed_up for _, speed_up in found], wanted, None, 2),
                    *(
                        Cell([share[kind] for share in shares], 0 if title == "joint" else wanted, None, 0)
                        for kind in (0, 1)
                    ),
                ],
            )
        )
    columns = ("method and settings, reduction", "mean of exits", "exit 1", "exit 3", "last exit", "early", "layers x")
    return Table(
        f"Settings of the alignment, {TASKS[0]}",
        (*columns, "conflicting steps, %", "reversed steps, %"),
        rows,
        (
            f"Scores on development rows, per cent; early is by entropy, set to {SPEED_UP} on held-out rows. A step"
            " conflicts where the gradients of cross-entropy and distillation do, and is reversed where a weight is"
            " below 0 in any block. Mean ± deviation over the seeds.",
        ),
    )


def figure3(order: Order, out: Path) -> list[str]:
    """Draw the angles under mutual learning for either reduction; return the Markdown that shows them."""
    shown = []
    for reduction in REDUCTIONS:
        of_reduction = Order(order.folder, TASKS[:1], ("ml",), order.seeds, order.settings | {"reduction": reduction})
        page, _, picture = PIECES["figure3"].make(of_reduction, order.folder / f"evidence-angles-{reduction}")
        text = page.read_text(encoding="utf-8").replace("# Figure 3", "## Figure 3")
        shown.append(text.replace("gradients\n", f"gradients, distillation by {reduction}\n", 1))
        shown.append(f"![Histogram of the angles, distillation by {reduction}]({picture.name})\n")
        picture.replace(out / picture.name)
    return shown


def outcomes(order: Order) -> list[dict[str, Any]]:
    """Return what each finished run came to."""
    configs = dict.fromkeys(PIECES["table2"].needs(order))
    for several in variants(order).values():
        configs.update(dict.fromkeys(several))
    return [
        {
            "task": run.config.task,
            "method": run.config.method,
            "seed": run.config.seed,
            **{name: run.config.to_dict()[name] for name in ("reduction", "granularity", "clamp")},
            "main": run.result["main"],
            "development": run.scores,
            "early by entropy": dict(zip(("score", "layers"), early(run), strict=True)),
            "steps": run.result["steps"],
            "seconds": round(run.result["seconds"], 1),
            "conflicting and reversed steps, %": conflicts(run),
        }
        for run in order.finished(configs)
    ]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder or name of an encoder")
    parser.add_argument("--data-dir", required=True, help="folder of the GLUE tasks' folders")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/evidence"), help="folder of the runs (default: runs/evidence)"
    )
    parser.add_argument("--no-train", action="store_true", help="make it of the runs that are finished")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results into this folder; printed if left out")
    return parser.parse_args(arguments)


def main() -> None:
    """Train what is missing, and write the page's tables and pictures."""
    options = options_of()
    paths = {"backbone": options.backbone, "data_dir": options.data_dir}
    paths = {name: str(Path(path).resolve()) if Path(path).exists() else path for name, path in paths.items()}
    order = Order(options.runs, TASKS, METHODS, range(options.seeds), {**SETTINGS, **paths}, options.device)
    if order.depth(TASKS[0]) <= max(_SHOWN):
        raise ValueError(f"`--backbone` must have {max(_SHOWN) + 1} layers at least, got {order.depth(TASKS[0])}.")
    if not options.no_train:
        order.train(PIECES["table2"].needs(order))
        order.train([config for configs in variants(order).values() for config in configs])
    out = options.out or options.runs
    out.mkdir(parents=True, exist_ok=True)
    recorded = record(options.device)
    table2 = reproduce("table2", order, training=False)[0].read_text(encoding="utf-8")
    how = f"at commit {recorded['commit']}, {recorded['device name']}, {recorded['machine']}, torch {recorded['torch']}"
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in SETTINGS.items())
    tables = (table2, by_entropy(order).markdown(), by_settings(order).markdown())
    page = [
        f"```\n{recorded['command']}\n```\n",
        f"Tables made {how}; runs that were finished were taken as they were.\n",
        f"All runs: {settings}; the rest is the command line's default. So all methods have exits of the same kind.\n",
        *(text.replace("# ", "## ", 1) for text in tables),
        *figure3(order, out),
    ]
    (out / "evidence.md").write_text("\n".join(page), encoding="utf-8")
    write(out / "evidence.json", {"benchmark": "evidence", **recorded, "settings": SETTINGS, "runs": outcomes(order)})
    print("\n".join(page))


if __name__ == "__main__":
    main()

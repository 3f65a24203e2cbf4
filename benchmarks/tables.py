"""The benchmarks' results as the tables of docs/performance.md.

    python benchmarks/tables.py                              prints them, from benchmarks/results
    python benchmarks/tables.py --into docs/performance.md   writes them there

In the page a benchmark's tables stand between the comments ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("step_overhead", "memory", "gramian", "scaling")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; all columns but the first are flush right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def failures(ways: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a list of the ways that failed, and with what; nothing where none did."""
    # Double ticks, for a message may quote with single ones.
    lines = [f"- {way}: `` {figures['failed']} ``" for way, figures in ways.items() if "failed" in figures]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def step_overhead(results: Mapping[str, Any]) -> list[str]:
    """Return a titled table for each case: milliseconds, and ratios to the floor and to joint training."""
    blocks = []
    for case in results["cases"].values():
        rows = []
        for way, figures in case["ways"].items():
            if "failed" in figures:
                continue
            ratios = [_number(figures.get(f"of {reference}")) for reference in ("floor", "joint")]
            rows.append([_named(way, figures), f"{1e3 * figures['seconds']:.1f}", *ratios])
        blocks += [f"{case['title']}:", table(["", "ms", "of the floor", "of joint"], rows), *failures(case["ways"])]
    return blocks


def memory(results: Mapping[str, Any]) -> list[str]:
    """Return a titled table for each case: what a way holds over joint training, in both orders of the loop."""
    blocks = []
    for case in results["cases"].values():
        if "title" not in case:  # joint training itself failed
            continue
        orders = case["orders"]
        head = ["over joint training, MiB (in P)", *orders]
        ways: dict[str, Mapping[str, Any]] = {}
        rows = []
        for figures in orders.values():
            for way, of in figures.items():
                ways[way] = of if "failed" in of else ways.get(way, of)
        for way, of_way in ways.items():
            if "failed" not in of_way:
                rows.append([_named(way, of_way), *(_over_joint(figures[way]) for figures in orders.values())])
        size = f"P = {case['gradient bytes'] / 2**20:.1f} MiB"
        blocks += [f"{case['title']}, K = {case['K']}, {size}:", table(head, rows), *failures(ways)]
    return blocks


def gramian(results: Mapping[str, Any]) -> list[str]:
    """Return one table: milliseconds, share of copy bandwidth and error of each call, for each P and K."""
    names = dict.fromkeys(name for case in results["cases"] for name in case["calls"] if name != "copy")
    rows = []
    for case in results["cases"]:
        cells = [_call(case["calls"].get(name)) for name in names]
        rows.append([f"{case['P']:,}", str(case["K"]), *cells])
    head = ["P", "K", *(f"`{name}`" if "@" in name else name for name in names)]
    said = {
        f"{name}, P = {case['P']:,}, K = {case['K']}": figures
        for case in results["cases"]
        for name, figures in case["calls"].items()
    }
    return [table(head, rows), *failures(said)]


def scaling(results: Mapping[str, Any]) -> list[str]:
    """Return a titled table for each of K and P: each way's ratio to the floor."""
    blocks = []
    for size, cases in results["cases"].items():
        names = dict.fromkeys(way for case in cases for way in case["ways"] if way != "floor")
        floors = [case["ways"].get("floor", {}).get("seconds") for case in cases]
        rows = [["the floor, ms", *("-" if taken is None else f"{1e3 * taken:.1f}" for taken in floors)]]
        reasons: dict[str, Mapping[str, Any]] = {}
        for name in names:
            of_way = [case["ways"].get(name, {}) for case in cases]
            if wrong := [figures for figures in of_way if "failed" in figures]:
                reasons[name] = wrong[0]
            if any("of floor" in figures for figures in of_way):
                rows.append([name, *("failed" if "failed" in of else _number(of.get("of floor")) for of in of_way)])
        head = ["", *(f"{size} = {case[size]:,}" for case in cases)]
        blocks += [f"Against {size}, of the floor:", table(head, rows), *failures(reasons)]
    return blocks


def section(path: Path, page: Path) -> str:
    """Return a result file's part of the page: how it was measured, its tables and its plot.

    Args:
        path: The JSON.
        page: Where the plot is shown.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    name = results["benchmark"]
    where = f"commit {results['commit']}, {results['device name']}, {results['machine']}, torch {results['torch']}"
    peers = ", ".join(f"{peer} {version}" for peer, version in results["peers"].items() if version != "not installed")
    rounds = results["rounds"]
    how = f"{where}{', ' if peers else ''}{peers}; " + ("median of {rounds} rounds" if rounds > 1 else "one round")
    blocks = [f"```\n{results['command']}\n```", how.format(rounds=rounds) + "."]
    blocks += {"step_overhead": step_overhead, "memory": memory, "gramian": gramian, "scaling": scaling}[name](results)
    plot = path.with_suffix(".png")
    if plot.exists():
        shown = Path(os.path.relpath(plot, page.parent)).as_posix()
        blocks.append(f"![{name.replace('_', ' ')}, drawn from the same figures]({shown})")
    return "\n\n".join(blocks)


def sections(name: str, page: Path, results: Path = RESULTS) -> str:
    """Return the parts of all devices that a benchmark has results of, the CPU's first."""
    files = [results / f"{name}.json", *sorted(results.glob(f"{name}-*.json"))]
    return "\n\n".join(section(path, page) for path in files if path.exists())


def filled(text: str, page: Path, results: Path = RESULTS) -> str:
    """Return the page's text with every benchmark's tables in their place, where there are results."""
    for name in BENCHMARKS:
        if made := sections(name, page, results):
            start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            head, _, rest = text.partition(start)
            _, found, tail = rest.partition(end)
            if not found:
                raise ValueError(f"{page} must hold {start} and, further on, {end}.")
            text = f"{head}{start}\n\n{made}\n\n{end}{tail}"
    return text


def _named(way: str, figures: Mapping[str, Any]) -> str:
    """Return a way's name, with how it differentiated where it says so."""
    return f"{way}, {figures['derivative']}" if "derivative" in figures else way


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _over_joint(figures: Mapping[str, Any]) -> str:
    """Return a cell of the memory's table."""
    return f"{figures['MiB over joint']:.0f} ({figures['P over joint']:.2f})"


def _call(figures: Mapping[str, Any] | None) -> str:
    """Return a cell of the Gramian's table."""
    if figures is None:
        return "-"
    if "failed" in figures:
        return "failed"
    share, error = figures["share of copy bandwidth"], figures["relative error"]
    return f"{1e3 * figures['seconds']:.3g} ms, {100 * share:.0f} %, {error:.0e}"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write them there")
    options = parser.parse_args()
    if options.into:
        text = filled(options.into.read_text(encoding="utf-8"), options.into, options.results)
        options.into.write_text(text, encoding="utf-8")
        return
    for name in BENCHMARKS:
        if made := sections(name, Path("docs/performance.md"), options.results):
            print(f"<!-- {name} -->\n\n{made}\n\n<!-- end of {name} -->\n")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.report FILE`: tables (Markdown) and plots (PNG) from the JSON of a benchmark run.

FILE comes from `pytest benchmarks/ --record FILE`, or from `make gpu`. The tables go to the terminal; with --out FOLDER
they go to FOLDER/report.md, beside the plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.checks import passed
from benchmarks.measure import Row, table


def render(report: dict[str, Any]) -> str:
    """All tables of a report, as Markdown."""
    parts = [_machine(report)]
    rows = [Row(**row) for row in report.get("rows", [])]
    for suite in dict.fromkeys(row.suite for row in rows):
        parts.append(
            f"## {suite.capitalize()}\n\n" + _timings([r for r in rows if r.suite == suite], report.get("ceilings", {}))
        )
    if report.get("splits"):
        parts.append("## Where a guided step's time goes\n\n" + _splits(report["splits"]))
    if report.get("counts"):
        parts.append("## Counts of a step\n\n" + _counts(report["counts"]))
    return "\n\n".join(parts) + "\n"


def _machine(report: dict[str, Any]) -> str:
    environment, ceilings = report["environment"], report.get("ceilings")
    text = f"# {environment['device']}\n\n" + ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "cuda", "triton", "python", "commit") if environment[name]
    )
    if ceilings:
        text += (
            f"\n\nCeilings, of the same run: {ceilings['memory_bytes_per_s'] / 1e9:,.1f} GB/s to and from memory, "
            f"{ceilings['matrix_flops_per_s'] / 1e12:,.3f} TFLOP/s in a large matrix product"
        )
        if peak := ceilings.get("peak_flops_per_s"):
            text += f", of {peak / 1e12:,.1f} TFLOP/s by the data sheet"
        text += "."
    return text


def _timings(rows: list[Row], ceilings: dict[str, float]) -> str:
    lines = []
    ours = {row.case: row for row in rows if row.implementation == OURS}
    order = list(dict.fromkeys(row.case for row in rows))  # rows of one case need not be adjacent
    for row in sorted(rows, key=lambda row: order.index(row.case)):
        own = ours.get(row.case)
        lines.append(
            [
                row.case if row is own or own is None else "",
                row.implementation,
                f"{row.seconds * 1e3:.3f}",
                f"{row.fastest * 1e3:.3f} to {row.slowest * 1e3:.3f}",
                _predicted(row),
                f"{row.samples / row.seconds:,.0f}" if row.samples else "",
                f"{row.flops / row.seconds / 1e12:.3f}" if row.flops else "",
                f"{row.bytes / row.seconds / 1e9:.1f}" if row.bytes else "",
                _mfu(row, ceilings),
                _share(row, ceilings),
                f"{row.seconds / own.seconds:.2f} x" if own and row is not own else "",
            ]
        )
    header = [
        "case", "implementation", "ms", "range", "predicted ms", "samples/s", "TFLOP/s", "GB/s", "MFU", "of ceiling",
        "ours is faster",
    ]  # fmt: skip
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def _predicted(row: Row) -> str:
    """Milliseconds in the roofline model, a lower bound of the measured time."""
    return f"{row.predicted * 1e3:.3f}" if row.predicted else ""


def _mfu(row: Row, ceilings: dict[str, float]) -> str:
    """Needed FLOPs over the data sheet's peak; empty if that is unknown."""
    peak = ceilings.get("peak_flops_per_s")
    return f"{row.flops / row.seconds / peak:.1%}" if peak and row.flops else ""


def _share(row: Row, ceilings: dict[str, float]) -> str:
    """The least time of the needed work at the measured ceilings, over the measured time."""
    floor = row.floor(ceilings) if ceilings else 0.0
    return f"{floor / row.seconds:.0%}" if floor else ""


def compact(report: dict[str, Any]) -> str:
    """One line per case with our time and the ratio of its peers; then failed checks and missing results."""
    ceilings = report.get("ceilings", {})
    cases: dict[str, list[Row]] = {}
    for values in report.get("rows", []):
        row = Row(**values)
        cases.setdefault(row.label, []).append(row)
    lines = []
    for label, rows in cases.items():
        ours = next((row for row in rows if row.implementation == OURS), None)
        peers = [row for row in rows if row is not ours]
        cells = [label, "", "", "", "", "", ", ".join(f"{r.implementation} {r.seconds * 1e3:.3f} ms" for r in peers)]
        if ours:
            speed = f"{ours.samples / ours.seconds:,.0f}" if ours.samples else ""
            ratios = ", ".join(f"{r.implementation} {r.seconds / ours.seconds:.2f} x" for r in peers)
            cells[1:] = [
                f"{ours.seconds * 1e3:.3f}",
                _predicted(ours),
                speed,
                _mfu(ours, ceilings),
                _share(ours, ceilings),
                ratios,
            ]
        lines.append(cells)
    parts = [_machine(report)]
    if lines:
        parts.append(table(["case", "ms", "predicted ms", "samples/s", "MFU", "of ceiling", "peers"], lines))
    if report.get("splits"):
        parts.append(_splits(report["splits"]))
    checks = report.get("checks", [])
    failed = [check for check in checks if not passed(check)]
    parts.append(f"{len(checks)} checks, {len(failed)} failed")
    parts += [
        f"FAILED {c['check']}: {c['error']:.2e} of {c['bound']:.1e} {c.get('note', '')[:100]}" for c in failed[:20]
    ]
    for kind in ("errors", "missing"):
        parts += [f"{kind}: {name}: {why[:100]}" for name, why in list(report.get(kind, {}).items())[:20]]
    return "\n".join(parts)


def _splits(splits: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(splits.values())))
    return table(
        ["ms", *names],
        [[case, *(f"{split[name] * 1e3:.2f}" for name in names)] for case, split in splits.items()],
    )


def _counts(counts: dict[str, dict[str, Any]]) -> str:
    columns = {
        "forwards per sample": ("forwards", "{:.2f}", 1),
        "GFLOP per sample": ("flops", "{:,.1f}", 1e-9),
        "operators": ("operators", "{:,}", 1),
        "launches": ("launches", "{:,}", 1),
        "GB read and written": ("moved_bytes", "{:,.1f}", 1e-9),
        "least ms on an H200": ("least_ms", "{:,.1f}", 1),
        "host waits": ("host_waits", "{}", 1),
        "saved MB per layer and sample": ("saved_bytes", "{:.2f}", 1e-6),
        "bytes per parameter": ("bytes_per_parameter", "{:g}", 1),
    }
    lines = [
        [name, *(text.format(row[key] * unit) if key in row else "" for key, text, unit in columns.values())]
        for name, row in counts.items()
    ]
    return table(["step", *columns], lines)


# ----------------------------------------------------------------------------
# Plots.


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw one picture per suite, and the split of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [Row(**row) for row in report["rows"]]
    made = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        plt.close(figure)
        made.append(folder / name)

    for suite in dict.fromkeys(row.suite for row in rows):
        chosen = [row for row in rows if row.suite == suite]
        ours = {row.case: row.seconds for row in chosen if row.implementation == OURS}
        names = list(dict.fromkeys(row.implementation for row in chosen))
        at, ticks, position = {}, {}, 0.0
        for case in dict.fromkeys(row.case for row in chosen):
            bars = [row.implementation for row in chosen if row.case == case]
            at |= {(case, name): position + i for i, name in enumerate(bars)}
            ticks[case] = position + (len(bars) - 1) / 2
            position += len(bars) + 0.7
        figure, axes = plt.subplots(figsize=(8, 1 + 0.17 * position))
        for i, name in enumerate(names):
            found = [row for row in chosen if row.implementation == name and row.case in ours]
            speeds = [ours[row.case] / row.seconds for row in found]
            axes.barh([at[row.case, name] for row in found], speeds, 0.85, label=name, color=f"C{i}", zorder=2)
        axes.set_yticks(list(ticks.values()), list(ticks))
        axes.set_ylim(position - 0.6, -0.8)
        axes.set_xlabel(f"speed, {OURS} = 1")
        axes.set_title(f"{suite.capitalize()}, {report['environment']['device']}")
        axes.grid(axis="x", color="0.9", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, f"{suite}.png")

    if splits := report.get("splits"):
        figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(splits)))
        for i, name in enumerate(n for n in next(iter(splits.values())) if n != "step"):
            before = [sum(list(s.values())[1 : i + 1]) * 1e3 for s in splits.values()]
            axes.barh(list(splits), [s[name] * 1e3 for s in splits.values()], left=before, label=name, color=f"C{i}")
        axes.invert_yaxis()
        axes.set_xlabel("ms per step")
        axes.set_title(f"Where a guided step's time goes, {report['environment']['device']}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "split.png")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of a benchmark run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write report.md and plots to FOLDER")
    args = parser.parse_args()
    try:
        report = json.loads(args.file.read_text())
        text = render(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {args.file} is not the JSON of a benchmark run: {error!r}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        pictures = plot(report, args.out)
    except ImportError:
        print("error: plots need matplotlib: pip install 'mfengine[bench]'", file=sys.stderr)
        return 2
    text += "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    (args.out / "report.md").write_text(text)
    print(args.out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

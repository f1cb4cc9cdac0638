"""`python -m mfengine.report RUN [RUN ...]`: compare runs on one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import tyro

from mfengine import cli
from mfengine.configs import flatten, read_json
from mfengine.engine.preflight import CONFIG
from mfengine.engine.telemetry import METRICS, kept_metrics, sample_pictures
from mfengine.errors import InputError
from mfengine.files import check_writable, write_atomic, writing

FIRST = ("v_loss", "loss_u", "loss", "frechet_1nfe", "grad_norm", "lr", "samples_per_second", "du_dt_norm")
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#b82e2e", "#66aa00")
MANY = 10  # pictures of a run, at most

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ runs|map(attribute="name")|join(", ") }}</title>
<style>
 body { font: 14px system-ui, sans-serif; margin: 2em; color: #222 }
 h2 { margin: 1.6em 0 .4em } table { border-collapse: collapse } figure { margin: 0 }
 td, th { padding: .2em 1em .2em 0; text-align: left; border-bottom: 1px solid #ddd }
 .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)) }
 .strip { display: flex; gap: 8px; overflow-x: auto; margin-bottom: 1em } .strip img { height: 240px }
</style>
<script>{{ plotly|safe }}</script>
<h1>{{ runs|length }} run{{ "s" if runs|length > 1 }}</h1>
{% macro table(rows) %}
<table><tr><th></th>{% for run in runs %}<th style="color: {{ run.colour }}">{{ run.name }}</th>{% endfor %}</tr>
{% for name, values in rows %}<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{{ table(results) }}
<h2>Curves</h2><div class="plots">{% for plot in first %}<div>{{ plot|safe }}</div>{% endfor %}</div>
<h2>Samples</h2>
{% for run in runs %}<b style="color: {{ run.colour }}">{{ run.name }}</b><div class="strip">
{% for caption, source in run.pictures %}<figure><img src="{{ source }}" alt="samples of {{ run.name }}, {{ caption }}">
<figcaption>{{ caption }}</figcaption></figure>{% else %}none{% endfor %}</div>{% endfor %}
<h2>Configuration, where it differs</h2>{{ table(differences) }}
<h2>More curves</h2><div class="plots">{% for plot in more %}<div>{{ plot|safe }}</div>{% endfor %}</div>
</html>
"""


class Run(NamedTuple):
    """What a run folder holds."""

    name: str
    colour: str
    config: dict[str, Any]  # flat
    curves: dict[str, tuple[list[int], list[float]]]  # steps and values of each metric
    evaluated: dict[str, float]  # the metrics of mfengine.evaluate
    pictures: list[tuple[str, str]]  # captions, and pictures as data URLs


def read_run(folder: Path, colour: str) -> Run:
    """A run folder; InputError if it is none, or damaged."""
    config, path = read_json(folder / CONFIG), folder / METRICS
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in map(json.loads, kept_metrics(path, sys.maxsize)[0]):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    if not curves:
        raise InputError(f"{path} has no metrics yet: there is nothing to show")
    evaluated = read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    evaluated = {name: value for name, value in evaluated.items() if name.endswith(("nfe", "_floor"))}
    pictures = [(f"step {int(path.stem)}", _data_url(path)) for path in sample_pictures(folder, MANY)]
    return Run(folder.name, colour, flatten(config), curves, evaluated, pictures)


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def results(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the first table: how far runs came, how fast they were, how good they are."""

    def row(name: str, values: Sequence[float | str | None]) -> tuple[str, list[str]]:
        return name, ["" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in values]

    def last(run: Run, name: str) -> float | None:
        return run.curves[name][1][-1] if name in run.curves else None

    rows = [
        row("network, objective", [f"{run.config.get('network')}, {run.config.get('objective')}" for run in runs]),
        row("steps", [str(max(steps[-1] for steps, _ in run.curves.values())) for run in runs]),
        row("samples/s (median)", [median(run.curves["samples_per_second"][1]) for run in runs]),
        row("MFU (median)", [f"{median(run.curves['mfu'][1]):.1%}" for run in runs]),
        *(row(f"{name}, last", [last(run, name) for run in runs]) for name in ("v_loss", "loss_u", "frechet_1nfe")),
        row("peak GPU memory, GB", [last(run, "memory_gb") for run in runs]),
        row("skipped steps", [last(run, "skipped_steps") for run in runs]),
    ]
    names = dict.fromkeys(name for run in runs for name in run.evaluated)
    rows += [row(f"{name}, by mfengine.evaluate", [run.evaluated.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Options in which the runs differ, with the value of each."""
    names = dict.fromkeys(name for run in runs for name in run.config if name != "name")
    rows = [(name, [run.config.get(name, "") for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def plots(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Plots as HTML: those to look at first, and the others. The blocks of a network share one for each run."""
    from plotly.graph_objects import Figure, Scatter

    def plot(title: str, lines: list[Scatter]) -> str:
        values = [value for line in lines for value in line.y]
        spread = min(values) > 0 and max(values) > 20 * min(values)
        figure = Figure(lines)
        figure.update_layout(title=title, height=280, margin={"l": 50, "r": 10, "t": 40, "b": 30}, showlegend=False,
                             template="simple_white", hovermode="x", yaxis_type="log" if spread else "linear",
                             xaxis_title="step")  # fmt: skip
        return figure.to_html(include_plotlyjs=False, full_html=False, config={"displayModeBar": False})

    def line(run: Run, name: str, label: str, colour: str | None) -> Scatter:
        steps, values = run.curves[name]
        return Scatter(x=steps, y=values, name=label, line={"color": colour, "width": 1.5})

    made = {}
    names = dict.fromkeys(name for run in runs for name in run.curves)
    for name in names:
        if "/" not in name:
            made[name] = plot(name, [line(run, name, run.name, run.colour) for run in runs if name in run.curves])
    for group in dict.fromkeys(name.partition("/")[0] for name in names if "/" in name):
        for run in runs:
            blocks = [name for name in run.curves if name.startswith(f"{group}/")]
            title = f"{group} of each block, {run.name}"
            if blocks:
                made[title] = plot(title, [line(run, name, name.partition("/")[2], None) for name in blocks])
    first = [made.pop(name) for name in FIRST if name in made]
    return first, [*made.values()]


@dataclass(frozen=True)
class ReportArgs:
    """Compare runs on one page: curves, samples, metrics, throughput, and where their configurations differ."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """run folders"""
    out: Path | None = None
    """the page; report.html in the first run's folder if not given"""


def main(args: Sequence[str]) -> None:
    config = cli.parse(ReportArgs, args, "report")
    if not config.runs:
        raise InputError("RUN must be given")
    out = config.out or config.runs[0] / "report.html"
    check_writable(out)
    runs = [read_run(folder, COLOURS[i % len(COLOURS)]) for i, folder in enumerate(config.runs)]
    try:
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("the report needs plotly and jinja2: pip install 'mfengine[report]'") from None
    first, more = plots(runs)
    page = Environment(autoescape=True).from_string(PAGE).render(
        runs=runs, results=results(runs), differences=differences(runs), first=first, more=more, plotly=get_plotlyjs()
    )  # fmt: skip
    with writing(out):
        write_atomic(out, page)
    print(f"report of {len(runs)} run(s): {out}")


if __name__ == "__main__":
    cli.run(main)

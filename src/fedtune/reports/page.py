"""report.html: one page that needs no network, with curves to hover and to filter."""

from __future__ import annotations

import html
import json
from string import Template
from typing import TYPE_CHECKING, Any

from fedtune.files import printable
from fedtune.reports.results import metric_names, settings, unfinished
from fedtune.runs.figures import PALETTE

if TYPE_CHECKING:
    from pandas import DataFrame

FILTERS = ("task", "model", "split", "clients", "seed")
_MOST = 1000  # curves; a page with more of them would not open
_LONGEST = 1000  # characters of a name or a reason
_DASHES = ("solid", "dot", "dashdot", "longdash", "longdashdot")
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>fedtune: $title</title>
<link rel="icon" href="data:,">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 8px; text-align: left; white-space: nowrap; }
label { margin-right: 1.2em; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<h2>Curves</h2>
<p>Colour: number of clients. Line: model. Dashes with crosses: the centralised baseline. Runs with one client, and
centralised ones, stay whatever split and clients are chosen: they are the baseline. Hover for a run.</p>
<p id="filters">$filters</p>
$figure
<h2>Results</h2>
<p>Accuracy after the last round: mean over seeds (least to greatest); rounds to a share of the baseline's accuracy.</p>
$results
<h2>Differences between runs</h2>
$differences
<h2>Failed and damaged runs</h2>
$failed
<script>
const about = $about;
const titles = $titles;
const shown = {metric: $metric};
function choose(key, value) {
  shown[key] = value;
  const fits = (one, name) => !shown[name] || one[name] === shown[name] || one.baseline && ["clients", "split"].includes(name);
  const visible = about.map(one => one.metric === shown.metric && $names.every(name => fits(one, name)));
  Plotly.restyle("curves", {visible: visible});
  Plotly.relayout("curves", {"yaxis.title.text": titles[shown.metric]});
}
</script>
</body>
</html>
""")


def page(rounds: DataFrame, table: DataFrame, failed: dict[str, str], title: str) -> str:
    """The page.

    Args:
        rounds: as from `read_runs`.
        table: the table of results, text in every cell.
        failed: directory -> reason.
        title: what the runs are.
    """
    metrics = metric_names(rounds)
    metrics, drawn = metrics[:_MOST], rounds.run.unique()[: max(1, _MOST // len(metrics[:_MOST]))]
    few = "" if len(drawn) == rounds.run.nunique() else f" Curves of the first {len(drawn)} only."
    figure, about = _figure(rounds[rounds.run.isin(drawn)], metrics)
    runs, longest = rounds[rounds.kind == "federated"].run.nunique(), int(rounds["round"].max())
    values = {
        name: sorted(map(_printed, rounds.loc[rounds.kind == "federated", name].unique()), key=_natural) for name in FILTERS
    }
    return _PAGE.substitute(
        title=_text(title),
        summary=f"{runs} runs, {longest} rounds at most, {unfinished(rounds)} unfinished, {len(failed)} failed or damaged."
        + few,
        filters=_select("metric", list(map(_printed, metrics)))
        + "".join(_select(name, found, "all") for name, found in values.items()),
        figure=figure,
        results=_table(table),
        differences=_differences(rounds),
        failed=_list(failed),
        about=_script(about),
        names=_script(FILTERS),
        metric=_script(_printed(metrics[0])),
        titles=_script({_printed(name): _drawn(name) for name in metrics}),
    )


def _figure(rounds: DataFrame, metrics: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The curves as HTML with the plotting library in it, and what each curve is about."""
    from plotly.graph_objects import Figure, Scatter

    federated = rounds[rounds.kind == "federated"]
    colours = dict(zip(sorted(federated.clients.unique()), PALETTE * 100, strict=False))
    dashes = dict(zip(sorted(federated.model.unique()), _DASHES * 100, strict=False))
    figure, about = Figure(), []
    for (*_, run), one in rounds.groupby(["task", "model", "clients", "split", "seed", "run"], dropna=False):
        first = one.iloc[0]
        pooled = first.kind != "federated"
        baseline = pooled or first.clients == 1
        line = {"color": "#555", "dash": "dash"} if pooled else {"color": colours[first.clients], "dash": dashes[first.model]}
        what = first.kind if pooled else f"{first.clients} clients, {first.split}"
        name = f"{first.task}, {first.model}, {what}, seed {first.seed}"
        for metric in metrics:
            drawn = {"mode": "lines+markers", "marker": {"symbol": "x" if pooled else "circle", "size": 5}, "line": line}
            hover = f"{_drawn(name)}<br>round %{{x}}: %{{y:.4f}}<extra>{_drawn(run)}</extra>"
            figure.add_trace(
                Scatter(
                    x=one["round"],
                    y=one[metric],
                    connectgaps=True,
                    name=_drawn(name),
                    visible=metric == metrics[0],
                    hovertemplate=hover,
                    **drawn,
                )
            )
            of_run = {key: _printed(first[key]) for key in FILTERS}
            about.append(of_run | {"metric": _printed(metric), "baseline": bool(baseline)})
    figure.update_xaxes(title="round", tick0=0, dtick=max(1, round(rounds["round"].max() / 10)))
    figure.update_layout(height=560, yaxis_title=_drawn(metrics[0]), template="plotly_white", legend_font_size=10)
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="curves"), about


def _script(value: Any) -> str:
    """A value for a script, which no name in it can end."""
    return json.dumps(value).replace("<", "\\u003c")


def _printed(value: object) -> str:
    return printable(value, _LONGEST)


def _text(value: object) -> str:
    """A text that the page shows as it is."""
    return html.escape(_printed(value))


def _drawn(value: object) -> str:
    """A text that the plotting library shows as it is: it knows some HTML, and its own placeholders."""
    return _text(value).replace("%{", "%&#123;")


def _select(name: str, values: list[str], every: str | None = None) -> str:
    options = ([f'<option value="">{every}</option>'] if every else []) + [
        f'<option value="{html.escape(value)}">{_text(value)}</option>' for value in values
    ]
    return f'<label>{name} <select id="{name}" onchange="choose(\'{name}\', this.value)">{"".join(options)}</select></label>'


def _table(table: DataFrame) -> str:
    shown = table.rename(columns=printable).map(lambda value: _printed(value) if isinstance(value, str) else value)
    return str(shown.to_html(index=False, border=0))


def _differences(rounds: DataFrame) -> str:
    other = settings(rounds)
    if not other:
        return "<p>None but in task, model, split, clients and seed.</p>"
    return _table(rounds.loc[rounds.kind == "federated", ["run", *FILTERS, *other]].drop_duplicates())


def _list(failed: dict[str, str]) -> str:
    if not failed:
        return "<p>None.</p>"
    lines = "".join(f"<li><b>{_text(run)}</b>: {_text(reason)}</li>" for run, reason in failed.items())
    return f'<ul id="failed">{lines}</ul>'


def _natural(value: str) -> tuple[int, str]:
    return (int(value), "") if value.isdigit() else (10**9, value)

"""One self-contained HTML page about one or several runs: tables, curves, label evolution, hazards, configuration."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from raysseg.visualization import curves
from raysseg.visualization.alarms import alarms
from raysseg.visualization.engine_curves import engine_figure
from raysseg.visualization.run_directory import SAMPLING_PHASES, RunDirectory, VariantRun, load_variant_runs
from raysseg.visualization.step_curves import step_figure, step_spreads
from raysseg.visualization.tables import (
    ComparisonRow,
    comparison_table,
    default_baseline,
    footnotes,
    group_by_label,
    percent,
    spread,
    table_cells,
)

Groups = dict[str, list[VariantRun]]
"""The runs behind each row of the comparison."""

EXPLORATION_CAPTION = "Faint: every logged value; solid: running mean within the stage; dotted: a new stage begins."
ENGINE_CAPTION = "Faint: every iteration; solid: running mean; grey: actors sample."

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #262626; background: #fff;
  max-width: 1160px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem;
  border-bottom: 1px solid #e3e3e3; padding-bottom: .25rem; } h3 { font-size: 1.02rem; margin: 1.3rem 0 .4rem; }
p.lead, p.note, li.note, figcaption { color: #666; } p.note, li.note, figcaption { font-size: .87rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ebebeb; text-align: right; white-space: nowrap; }
th { background: #f7f7f7; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.baseline td { background: #fbf8ee; }
td.versions { text-align: left; white-space: normal; color: #666; font-size: .8rem; } .scroll { overflow-x: auto; }
figure { margin: .8rem 0; } img { max-width: 100%; height: auto; }
ul.alarms { border-left: 4px solid #d9822b; background: #fdf5ec; padding: .6rem 1rem .6rem 2rem; }
p.fine { border-left: 4px solid #5aa469; background: #f1f8f2; padding: .5rem 1rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: #f7f7f7; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
"""


def _picture(png: bytes, description: str, caption: str = "") -> str:
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}">{text}</figure>'


def _figure(figure: Figure | None, description: str, caption: str = "") -> str:
    return "" if figure is None else _picture(curves.figure_png(figure), description, caption)


def _table(headers: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """An HTML table; each line is its class (or "") and its ready-made cells."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f'<tr class="{css}">{"".join(cells)}</tr>' for css, cells in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _what_was_run(directories: Sequence[RunDirectory], runs: Sequence[VariantRun]) -> str:
    names = list(dict.fromkeys(run.run for run in runs))
    lines = []
    for name, directory in zip(names, {d.root: d for d in directories}.values(), strict=True):
        members = [run for run in runs if run.run == name]
        summaries = [run.summary for run in members if run.summary is not None]
        facts = {
            key: ", ".join(sorted({str(summary[key]) for summary in summaries if summary.get(key) is not None})) or "–"
            for key in ("method", "recipe", "split", "images")
        }
        hours = sum(float(summary.get("wall_seconds") or 0.0) for summary in summaries) / 3600
        finished = f"{len(summaries)} of {len(members)}"
        versions = ", ".join(f"{key} {value}" for key, value in directory.versions().items()) or "–"
        cells = [name, *facts.values(), finished, f"{hours:.2f} h"]
        lines.append(("", [f"<td>{escape(cell)}</td>" for cell in cells]))
        lines.append(("", [f'<td class="versions" colspan="7">versions: {escape(versions)}</td>']))
    return _table(["run", "method", "recipe", "evaluated on", "images", "finished", "wall time"], lines)


def _headline(rows: Sequence[ComparisonRow]) -> str:
    headers, cells = table_cells(rows)
    lines = [
        ("baseline" if row.label == row.baseline else "", [f"<td>{escape(cell)}</td>" for cell in line])
        for row, line in zip(rows, cells, strict=True)
    ]
    notes = "".join(f'<li class="note">{escape(note)}</li>' for note in footnotes(rows))
    return _table(headers, lines) + f"<ul>{notes}</ul>"


def _steps(runs: Sequence[VariantRun]) -> str:
    """Variants × t: the mIoU after t contexts; nothing where none was scored at several t."""
    found = step_spreads(runs)
    if not found:
        return ""
    times = sorted({step for spreads in found.values() for step in spreads})
    lines = []
    for label, spreads in found.items():
        seeds = max(value.n for value in spreads.values())
        cells = [label, *(percent(spreads.get(step), seeds=seeds) for step in times)]
        lines.append(("", [f"<td>{escape(cell)}</td>" for cell in cells]))
    return _table(["mIoU (%)", *(f"t = {step}" for step in times)], lines)


def _shade(value: float) -> str:
    """Background of an IoU cell, 0…1: white to blue, always light enough for dark text."""
    low, high = (255, 255, 255), (112, 166, 219)
    return "#" + "".join(
        f"{round(a + (b - a) * min(max(value, 0.0), 1.0)):02x}" for a, b in zip(low, high, strict=True)
    )


def _per_class(groups: Groups) -> str:
    """Classes × variants, mean over the finished seeds; one table for each list of classes."""
    found: dict[tuple[str, ...], dict[str, list[list[float | None]]]] = {}
    for label, members in groups.items():
        for summary in (member.summary for member in members if member.summary is not None):
            names, ious = tuple(summary.get("class_names") or ()), summary.get("per_class_iou")
            if names and ious:
                found.setdefault(names, {}).setdefault(label, []).append(ious)
    return "".join(_class_table(names, by_label) for names, by_label in found.items())


def _class_table(names: Sequence[str], by_label: dict[str, list[list[float | None]]]) -> str:
    lines = []
    for index, name in enumerate(names):
        cells = [f"<td>{escape(name)}</td>"]
        for ious in by_label.values():
            value = spread(iou for seed in ious if (iou := seed[index]) is not None)
            if value is None:
                cells.append('<td title="not in the evaluation split">–</td>')
                continue
            detail = f"n={value.n}" if value.std is None else f"± {100 * value.std:.1f}, n={value.n}"
            colour = _shade(value.mean)
            cells.append(f'<td style="background:{colour}" title="{detail}">{100 * value.mean:.1f}</td>')
        lines.append(("", cells))
    return _table(["class", *by_label], lines)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _pictures(groups: Groups, name: str, what: str) -> str:
    """The pictures/<name>*.png of each variant's first seed that has any."""
    parts = []
    for label, members in groups.items():
        for member in members:
            pictures = sorted((member.path / "pictures").glob(f"{name}*.png"), key=_natural)
            if pictures:
                parts.append(f"<h3>{escape(label)}, seed {member.seed}</h3>")
                parts += [_picture(p.read_bytes(), f"{what} of {label}: {p.stem}") for p in pictures]
                break
    return "".join(parts)


def _hazards(groups: Groups) -> str:
    parts = []
    for label, members in groups.items():
        parts.append(f"<h3>{escape(label)}</h3>")
        lines = [f"seed {member.seed}, {alarm[0].lower()}{alarm[1:]}" for member in members for alarm in alarms(member)]
        if lines:
            parts.append('<ul class="alarms">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
        elif any(member.rows("explore") for member in members):
            parts.append('<p class="fine">No alarm: reward, correlation, acceptance and thresholds are as usual.</p>')
        elif not any(member.rows(*SAMPLING_PHASES) for member in members):
            parts.append('<p class="note">This variant explores nothing; the alarms do not apply.</p>')
        for member in members:
            figure = curves.exploration_figure(member)
            if figure is not None:
                caption = f"Seed {member.seed}. {EXPLORATION_CAPTION}"
                parts.append(_figure(figure, f"Exploration of {label}, seed {member.seed}", caption))
                break
    return "".join(parts)


def _engine(groups: Groups) -> str:
    """Throughput, lag, busy share and actors of each variant's first seed that sampled anything."""
    parts = []
    for label, members in groups.items():
        for member in members:
            figure = engine_figure(member)
            if figure is not None:
                parts.append(f"<h3>{escape(label)}</h3>")
                caption = f"Seed {member.seed}. {ENGINE_CAPTION}"
                parts.append(_figure(figure, f"Actors and learner of {label}, seed {member.seed}", caption))
                break
    return "".join(parts)


def _configurations(directories: Sequence[RunDirectory], groups: Groups) -> str:
    texts = {f"{d.root.name}: config.yaml": d.configuration() for d in directories}
    for label, members in groups.items():
        path = members[0].path / "config.yaml"
        if path.is_file():
            texts[f"{label}, seed {members[0].seed}"] = path.read_text(encoding="utf-8")
    parts = [
        f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        for title, text in texts.items()
        if text
    ]
    return "".join(parts) or '<p class="note">No config.yaml was written.</p>'


def write_report(runs: Sequence[Path], out: Path, *, baseline: str | None = None) -> Path:
    """Writes one HTML file about the runs, with every picture inside it: no network and no scripts.

    Args:
        runs: run directories, or variant folders of one.
        out: the HTML file to write; its folder is made where it is missing.
        baseline: a variant that the others are compared with; by default `none`, where the runs have it.

    Returns:
        `out`.

    Raises:
        InputError: for a path that is no run directory, or an unknown baseline.
    """
    directories = [RunDirectory(path) for path in runs]
    variant_runs = load_variant_runs(runs)
    rows = comparison_table(variant_runs, baseline=baseline or default_baseline(variant_runs))
    groups = group_by_label(variant_runs)
    pretraining = directories[0].pretraining() if len(directories) == 1 else {}
    title = "raysseg: " + ", ".join(dict.fromkeys(run.run for run in variant_runs))
    finished = sum(run.finished for run in variant_runs)
    sections = {
        "What was run": _what_was_run(directories, variant_runs),
        "Results": _headline(rows),
        "Accuracy over the stages": _figure(
            curves.accuracy_figure(variant_runs),
            "mIoU over the stages",
            "Line: mean of the seeds; band: ± one standard deviation.",
        ),
        "Accuracy over the steps": _figure(
            step_figure(variant_runs),
            "mIoU over the steps",
            "Line: mean of the finished seeds; band: ± one standard deviation.",
        )
        + _steps(variant_runs),
        "Labels over the stages": _figure(
            curves.label_figure(variant_runs), "Labelled share, precision and acceptance"
        ),
        "Label evolution": _pictures(groups, "evolution", "Label evolution"),
        "Labelled regions": _pictures(groups, "regions", "Labelled regions"),
        "Contexts step by step": _pictures(groups, "contexts", "Contexts"),
        "IoU per class": _per_class(groups),
        "Diagnostics": _hazards(groups),
        "Training": _figure(curves.training_figure(variant_runs, pretraining), "Training loss"),
        "Engine": _engine(groups),
        "Configuration": _configurations(directories, groups),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections.items() if content)
    lead = f"{len(rows)} variants, {finished} of {len(variant_runs)} variant runs finished."
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{lead}</p>{body}</body></html>\n'
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, out)
    return out

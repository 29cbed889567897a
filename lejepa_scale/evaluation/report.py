"""What was found, for people and for programs: a table, JSON, a CSV file for each protocol, a page. Refuses to measure."""

from __future__ import annotations

import csv
import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lejepa_scale.evaluation.suite import Evaluation, Result

# Names of the files of dinov2's and dinov3's evaluations, where they have one.
NUMBERS = "evaluation.json"
FILES = {
    "knn": "knn",
    "logistic": "log-regression",
    "linear": "linear",
    "few-shot": "few-shot",
    "retrieval": "retrieval",
    "attentive": "attentive",
    "segmentation": "semantic-segmentation",
    "finetune": "finetune",
}
# How each number was made, beside it: others' differ by protocol.
_HOW = {
    "knn": "votes of the k nearest training images by cosine, weighted by exp(cosine / T)",
    "logistic": "multinomial logistic regression (LBFGS), C chosen on held-out training images, then fitted on all",
    "linear": "linear classifiers by SGD at many learning rates at once, the best chosen on held-out training images",
    "few-shot": "classifiers on few images of every class, mean and standard deviation over draws",
    "retrieval": "test images query the training images by cosine",
    "attentive": "a learned query gathers the normalized tokens of the patches by cross-attention, a linear layer "
    "classifies (AdamW); many learning rates at once, the best chosen on held-out training images, then trained on all",
    "segmentation": "a linear layer on the features of the patches, its logits interpolated to the pixels of the mask "
    "(AdamW); many learning rates at once, the best chosen on held-out training images, then trained on all; mean IoU of "
    "one table of all test pixels, over the classes that masks or guesses have, without the pixels of id 255",
    "finetune": "all weights trained with a linear classifier (AdamW, layer-wise learning rates, random crops and flips); "
    "of several learning rates the best on held-out training images, then trained on all",
    "spectrum": "exp of the entropy of the singular values of the test images' centred features (RankMe)",
}


def as_table(found: Evaluation) -> str:
    """A line for every encoder and kind of features, a column for every protocol: shares in percent with half of the 95 %
    interval (few-shot: with the standard deviation over draws)."""
    table = _table(found)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(n) if i < 2 else cell.rjust(n) for i, (cell, n) in enumerate(cells)))
    return "\n".join(lines)


def _table(found: Evaluation) -> list[list[str]]:
    """A header, and a line for every encoder and kind of features."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in found.results:
        line = lines.setdefault((row.subject, row.features), {"encoder": row.subject, "features": row.features})
        line |= {**_cells(row), "width": str(row.width)}
    columns = [*dict.fromkeys(name for line in lines.values() for name in line if name != "width"), "width"]
    return [columns, *([line.get(name, "") for name in columns] for line in lines.values())]


def _cells(row: Result) -> dict[str, str]:
    """The columns that a result has in the table."""
    m = row.metrics
    if row.protocol == "spectrum":
        return {"eff. rank": f"{m['effective_rank']:.1f}"}
    if row.protocol == "retrieval":
        return {"mAP": f"{m['map']:.1%}", "R@1": f"{m['recall@1']:.1%}"}
    if row.protocol == "segmentation":
        return {"mIoU": f"{m['miou']:.1%}", "pixel acc.": f"{m['pixel_accuracy']:.1%}"}
    if row.protocol == "few-shot":
        spread = "" if m["std"] is None else f" ±{100 * m['std']:.1f}"
        return {row.variant: f"{m['top1']:.1%}{spread}"}
    name = {"knn": f"{row.variant.removeprefix('k=')}-NN"}.get(row.protocol, row.protocol)
    return {name: f"{m['top1']:.1%} ±{50 * (m['high'] - m['low']):.1f}"}


def as_json(found: Evaluation, command: str) -> str:
    """Everything, with what it takes to repeat it."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        **{name: version(name) for name in ("torch", "timm")},
    }
    return json.dumps({"about": about, "sets": found.sets, "results": [asdict(row) for row in found.results]}, indent=1)


def write(found: Evaluation, folder: Path, command: str) -> list[Path]:
    """evaluation.json, results-PROTOCOL.csv and evaluation.html; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    out = [folder / NUMBERS, folder / "evaluation.html"]
    out[0].write_text(as_json(found, command))
    out[1].write_text(as_page(found, command))
    for protocol, name in FILES.items():
        rows = [row for row in found.results if row.protocol == protocol]
        if rows:
            out.append(folder / f"results-{name}.csv")
            _write_csv(out[-1], rows)
    return out


def _write_csv(path: Path, rows: Sequence[Result]) -> None:
    table = []
    for row in rows:
        whole: dict[str, Any] = asdict(row)
        for name in ("metrics", "settings", "confusion"):
            whole.pop(name)
        table.append(whole | row.metrics | {f"setting {key}": value for key, value in row.settings.items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        writer.writeheader()
        writer.writerows(table)


def as_page(found: Evaluation, command: str) -> str:
    """One file without anything beside it: the table, how each number was made, and who is taken for whom."""
    text = html.escape
    sections = [f"<h1>Evaluation</h1><p>{time.strftime('%Y-%m-%d')}: <code>{text(command)}</code></p>"]
    sizes = ", ".join(f"{name}: {size['images']:,} images" for name, size in found.sets.items())
    classes = f", {len(found.classes)} classes" if found.classes else ""
    sections.append(f"<p>{text(sizes)}{classes}.</p>")
    header, *body = _table(found)
    sections.append(_html_table(header, body))
    sections.append("<h2>How each number was made</h2>")
    rows = [[r.subject, r.features, r.protocol, r.variant, _said(r.settings)] for r in found.results]
    sections.append(
        "".join(f"<p><b>{text(name)}</b>: {text(how)}.</p>" for name, how in _HOW.items() if _used(found, name))
    )
    sections.append(_html_table(["encoder", "features", "protocol", "", "settings"], rows))
    for row in found.results:
        if row.confusion is not None and len(row.confusion) <= _MOST_SHOWN and row.subject == found.results[0].subject:
            sections.append(
                f"<h2>{text(row.subject)}, {text(row.features)}, {text(row.protocol)} {text(row.variant)}</h2>"
            )
            sections.append(_confusion(row.confusion, [] if row.protocol == "segmentation" else found.classes))
    return _PAGE.replace("CONTENT", "\n".join(sections))


_MOST_SHOWN = 100  # classes of a table on the page
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
.confusion td, .confusion th { padding: .1rem .3rem; font-size: 11px; border: 0 }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere }
</style></head><body>
CONTENT
</body></html>
"""


def _used(found: Evaluation, protocol: str) -> bool:
    return any(row.protocol == protocol for row in found.results)


def _html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _confusion(table: list[list[int]], classes: Sequence[str]) -> str:
    """Rows: the true class; the deeper a cell, the larger its share of the row."""
    names = [html.escape(classes[i] if i < len(classes) else str(i)) for i in range(len(table))]
    rows = ["<tr><th>true \\ guessed</th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for name, row in zip(names, table, strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="background:rgba(30,100,200,{n / total:.2f})">{n}</td>' for n in row)
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f'<table class="confusion">{"".join(rows)}</table>'


def _said(settings: dict[str, Any]) -> str:
    values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key}={value}" for key, value in values.items())

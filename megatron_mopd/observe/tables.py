"""The final table on the terminal: the see-saw chart as text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.metrics import is_main_rank


def seesaw_table(
    matrix: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    headroom: Mapping[str, float],
    home: Mapping[str, str] | None = None,
    file: TextIO | None = None,
) -> None:
    """Print accuracies (in per cent) of models by domain, and the headroom recovered, on rank 0.

    Arguments are those of `report.draw_seesaw`. Domains are rows here, to keep the table narrow: the columns
    are every model that is not an expert, the domain's own expert, the mean of the other experts, and the
    headroom recovered. The output is plain text if `file` (standard output by default) is not a terminal.
    """
    if not is_main_rank():
        return
    if home is None:
        home = {name: name for name in row_names if name in column_names}
    others = [i for i, name in enumerate(row_names) if name not in home]
    table = Table(title="Accuracy on held-out prompts (%)", title_justify="left", title_style="bold")
    console = Console(file=file or sys.stdout, highlight=False)
    table.box = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2
    table.add_column("domain")
    for i in others[:1]:
        table.add_column(_name(row_names[i]), justify="right")
    table.add_column("expert", justify="right", style="yellow")
    table.add_column("other experts", justify="right", style="dim")
    for i in others[1:]:
        table.add_column(_name(row_names[i]), justify="right", style="bold" if i == others[-1] else "")
    table.add_column("headroom recovered", justify="right")

    rows = [_domain_row(matrix, row_names, j, name, home, others) for j, name in enumerate(column_names)]
    means = [_mean(column) for column in zip(*rows)]
    recovered = [headroom.get(name, math.nan) for name in column_names]
    mean_recovered = headroom.get("mean", _mean(recovered))
    for name, values, share in zip(column_names, rows, recovered):
        table.add_row(_name(name), *map(_percent, values), _share(share))
    table.add_section()
    table.add_row("mean", *map(_percent, means), _share(mean_recovered), style="bold")
    if not console.is_terminal:
        console.width = 200  # a file has no width: never wrap the columns
    console.print(table)


def _domain_row(matrix, row_names, column: int, domain: str, home, others: list[int]) -> list[float]:
    expert = [matrix[i][column] for i, name in enumerate(row_names) if home.get(name) == domain]
    away = [matrix[i][column] for i, name in enumerate(row_names) if name in home and home[name] != domain]
    rest = [matrix[i][column] for i in others]
    return [*rest[:1], _mean(expert), _mean(away), *rest[1:]]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _name(text: str) -> Text:
    return Text(visible(text))  # rich would interpret markup in a plain string


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def _share(value: float) -> Text:
    if not math.isfinite(value):
        return Text("-")
    return Text(f"{100 * value:.0f}%", style="green" if value >= 0.9 else "yellow" if value >= 0 else "red")

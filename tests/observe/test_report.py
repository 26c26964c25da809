"""Plots and the final table: drawn from whatever a run measured, with readable sizes and correct numbers."""

import io
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_mopd.observe import pictures
from megatron_mopd.observe.metrics import METRICS_FILE, MetricsWriter
from megatron_mopd.observe.pictures import draw_report, draw_seesaw
from megatron_mopd.observe.tables import seesaw_table

DOMAINS = [f"domain_number_{i}" for i in range(13)]


@pytest.fixture
def figures(monkeypatch):
    """Every saved figure, for inspection."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (saved.append(self), save(self, path)))
    return saved


def write(run_dir, lines):
    writer = MetricsWriter(run_dir, tensorboard=False)
    for iteration, line in enumerate(lines, start=1):
        writer.log(iteration, line)
    writer.close()


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def full_line(i):
    line = {"loss": 1 / i, "kl": 1 / i, "grad_norm": 2 / i, "response_length": 9.0, "lr": 1e-4}
    line |= {f"kl/{name}": 1 / (i + j) for j, name in enumerate(DOMAINS)}
    line |= {"time/rollout": 1.0, "time/student": 0.5}
    if i % 10 == 0:
        line |= {f"accuracy/{name}": i / 50 for name in DOMAINS} | {"accuracy": i / 50}
    return line


def test_every_panel_with_its_own_title_and_data(tmp_path, figures):
    write(tmp_path, [full_line(i) for i in range(1, 51)])
    assert draw_report(tmp_path) == tmp_path / "report.png"
    assert titles(figures[0]) == [
        "Reverse KL to the teachers (nats per token)",
        "KL by domain (nats per token)",
        "Accuracy on held-out prompts",
        "Response length (tokens)",
        "Gradient norm",
        "Time per step (seconds)",
    ]
    lines = {axes.get_title(loc="left"): axes.get_lines() for axes in figures[0].axes}
    assert np.allclose(lines["Gradient norm"][0].get_ydata(), [2 / i for i in range(1, 51)])
    assert len(lines["KL by domain (nats per token)"]) == 13
    assert matplotlib.image.imread(tmp_path / "report.png").shape[1] > 1500


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([{"loss": 2.0}], ["Loss"]),
        ([{"loss": 2.0}, {"loss": math.nan}, {"loss": 0.0}], ["Loss"]),
        ([{"accuracy/gcd": 0.5}], ["Accuracy on held-out prompts"]),
        ([{"time/rollout": 1.0}], ["Time per step (seconds)"]),
        ([{"time/rollout": 1.0}, {"time/rollout": 1.0, "time/save": 2.0}], ["Time per step (seconds)"]),
    ],
)
def test_runs_that_measured_little(tmp_path, figures, lines, expected):
    write(tmp_path, lines)
    assert draw_report(tmp_path) is not None
    assert titles(figures[0]) == expected


def test_nothing_to_draw(tmp_path):
    (tmp_path / METRICS_FILE).write_text("")
    assert draw_report(tmp_path) is None
    assert not (tmp_path / "report.png").exists()


def test_smoothing_keeps_length_and_constants():
    assert np.allclose(pictures._smooth(np.full(200, 3.0)), 3.0)
    assert len(pictures._smooth(np.arange(7.0))) == 7
    assert np.allclose(pictures._smooth(np.arange(100.0))[10:-10], np.arange(100.0)[10:-10])


def seesaw():
    rows = ["base", *DOMAINS, "averaging", "student"]
    matrix = np.full((16, 13), 0.2)
    matrix[0], matrix[-2], matrix[-1] = 0.4, 0.5, 0.85
    matrix[np.arange(1, 14), np.arange(13)] = 0.9
    return matrix, rows, DOMAINS, dict.fromkeys(DOMAINS, 0.9)


def test_seesaw_picture(tmp_path, figures):
    matrix, rows, columns, headroom = seesaw()
    assert draw_seesaw(matrix, rows, columns, tmp_path / "seesaw.png", headroom) == tmp_path / "seesaw.png"
    upper, lower = figures[0].axes
    outlined = [patch for patch in upper.patches if not patch.get_fill()]
    assert len(outlined) == 13
    assert [round(patch.get_x()) for patch in outlined] == list(range(13))
    texts = [text.get_text() for text in upper.texts]
    assert len(texts) == 16 * 14 and texts[:14] == ["40"] * 14
    assert [label.get_text() for label in upper.get_xticklabels()] == [*DOMAINS, "mean"]
    assert [round(bar.get_height(), 6) for bar in lower.patches] == [0.9] * 14
    assert matplotlib.image.imread(tmp_path / "seesaw.png").shape[1] > 1400


def test_seesaw_with_holes_and_extremes(tmp_path):
    matrix, rows, columns, headroom = seesaw()
    matrix[3, :] = math.nan
    headroom |= {DOMAINS[0]: -5.0, DOMAINS[1]: 40.0, DOMAINS[2]: math.nan, "mean": 0.5}
    draw_seesaw(matrix, rows, columns, tmp_path / "seesaw.png", headroom)
    draw_seesaw([[0.5]], ["base"], ["gcd"], tmp_path / "one.png", {})


def test_table_without_a_terminal():
    matrix, rows, columns, headroom = seesaw()
    matrix[2, 1] = math.nan
    file = io.StringIO()
    seesaw_table(matrix, rows, columns, headroom, file=file)
    text = file.getvalue()
    assert text.isascii() and "\x1b" not in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert cells[0] == [
        "domain",
        "base",
        "expert",
        "other experts",
        "averaging",
        "student",
        "headroom recovered",
    ]
    assert cells[1] == [DOMAINS[0], "40.0", "90.0", "20.0", "50.0", "85.0", "90%"]
    assert cells[2][2] == "-"
    assert cells[-1] == ["mean", "40.0", "90.0", "20.0", "50.0", "85.0", "90%"]


def test_table_on_other_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    file = io.StringIO()
    seesaw_table(*seesaw(), file=file)
    assert file.getvalue() == ""

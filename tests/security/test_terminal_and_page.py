"""Control characters and markup in names, prompts and model output are displayed and have no effect."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import re
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megatron_mopd
from megatron_mopd import train
from megatron_mopd.backend.finding import Finding, Level, show
from megatron_mopd.backend.messages import visible
from megatron_mopd.commands import generate, ranks
from megatron_mopd.commands import training as training_command
from megatron_mopd.config import ConfigError
from megatron_mopd.observe import pictures, svg, tables
from megatron_mopd.observe import progress as progress_module
from megatron_mopd.observe.charts import Line
from megatron_mopd.observe.metrics import MetricsWriter
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.progress import StepLine, phase, progress, say
from megatron_mopd.observe.seesaw import seesaw_chart
from megatron_mopd.observe.traces import Box, Panel

PACKAGE = Path(megatron_mopd.__file__).parent
BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *BIDI, 0xD800]
EVIL = "gcd\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\r\n[red]x[/red][link=http://a]y[/][/]"
EVIL_PAGE = EVIL + "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
ACTS = re.compile("[" + "".join(rf"\U{code:08x}" for code in ACTING if code not in (9, 10)) + "]")


def test_every_acting_character_is_escaped():
    for code in ACTING:
        escaped = visible(f"a{chr(code)}b")
        assert escaped.isprintable() and escaped.isascii() and escaped[1] == "\\" and len(escaped) > 3, code
        kept = visible(f"a{chr(code)}b", keep_lines=True)
        assert kept == (f"a{chr(code)}b" if code in (9, 10) else escaped)
    plain = "naïve עברית עִבְרִית 日本語 👩‍👩‍👧 \\x1b"
    assert visible(plain) == plain and visible(Path("a\x1b")) == r"a\x1b"


def assert_harmless(text, lines=None):
    assert not ACTS.search(text), repr(text)
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\r" in text, text
    assert "[red]x[/red][link=http://a]y[/][/]" in text
    if lines is not None:
        assert text.count("\n") == lines, "injected lines"


@pytest.fixture
def terminal(monkeypatch):
    """Draw bars as on a terminal, into a buffer."""
    drawn = io.StringIO()
    monkeypatch.setattr(progress_module, "is_terminal", lambda: True)
    monkeypatch.setattr(progress_module, "_BAR_AFTER_SECONDS", -1.0)
    plain = lambda **_: Console(file=drawn, force_terminal=True, width=300, color_system=None)  # noqa: E731
    monkeypatch.setattr(progress_module, "Console", plain)
    return drawn


def test_progress_bars(terminal):
    for _ in progress(range(2), EVIL):
        pass
    with phase(EVIL):
        progress_module._phases[-1]._show()
    text = re.sub("\x1b\\[(\\?25[hl]|1A|2K)|\r|\n", "", terminal.getvalue())  # the bar's own
    assert text.count("[red]x[/red]") >= 2
    assert_harmless(text)


def test_lines_of_a_run(capsys, monkeypatch):
    say(f"ALARM: {EVIL}")
    assert_harmless(capsys.readouterr().out, lines=1)
    monkeypatch.setattr(progress_module, "_LINE_AFTER_SECONDS", -1.0)
    list(progress([1], EVIL))
    with phase(EVIL):
        pass
    assert_harmless(capsys.readouterr().err, lines=2)
    line = StepLine(2).render(1, {"loss": 1.0, f"kl/{EVIL}": 0.5, f"time/{EVIL}": 1.0})
    assert_harmless(line.plain, lines=0)


def test_errors(capfd, monkeypatch):
    """Errors of the trainer, of tools on ranks, and of the doctor."""
    monkeypatch.setattr(training_command, "_leave", sys.exit)
    for error, lines in ((ConfigError(EVIL), 1), (RuntimeError(EVIL), None)):
        told = []
        monkeypatch.setattr(
            training_command, "is_first_to_fail", lambda message, told=told: told.append(message) or True
        )
        monkeypatch.setattr(training_command, "LIFELINE_NOTICES", 0)

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(training_command, "load_config", fail)
        with pytest.raises(SystemExit):
            train.main(["--config", "x"])
        assert_harmless(capfd.readouterr().err, lines)
        assert_harmless(told[0])
        monkeypatch.setattr(ranks, "start_ranks", fail)
        monkeypatch.setattr(ranks.os, "_exit", sys.exit)
        with pytest.raises(SystemExit):
            ranks.run_on_ranks(lambda: None)
        assert_harmless(capfd.readouterr().err, lines)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    ranks.say(EVIL)
    assert_harmless(capfd.readouterr().out, lines=1)
    show("The run", [Finding(Level.OK, EVIL, EVIL, EVIL)])
    assert_harmless(capfd.readouterr().out, lines=4)


def test_the_final_table(capsys):
    tables.seesaw_table([[0.5], [0.25]], ["base", f"other {EVIL}"], [EVIL], {EVIL: 0.5})
    text = capsys.readouterr().out
    assert not ACTS.search(text) and text.count("[red]x[/red]") == 2


# Expressions that a `print` in the package may show unescaped: numbers, the program's own words, and texts
# that are escaped where they are created.
_OWN = {
    "description",
    "line",
    "text",
    "message",
    "__doc__.strip()",
    "__doc__",
    "''",
    "summary(found)",
    "summary(software)",
    "attack_summary(found)",
    "section",
    "heads",
    "name",
    "note",
    "kind",
    "number",
    "world_size",
    "ranks_per_host",
    "options.kind",
    "steps",
    "socket.gethostname()",
    "_MARKS[finding.level]",
    "self._rank",
    "arguments[1]",
    "'per replica'",
    "'  OFF'",
}
_ESCAPED_BEFORE = {
    "backend/lifeline.py",  # tests/security tests it separately
    "confinement",
    "data",
}


def _is_safe(value):
    """Whether an expression in a `print` is escaped, formatted as a number, or on the list."""
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.JoinedStr):
        return all(_is_safe(part) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        spec = ast.unparse(value.format_spec) if value.format_spec else ""
        return bool(re.search(r"[fgde%]'$|\d+'?$", spec)) or _is_safe(value.value)
    if isinstance(value, ast.BinOp):
        return _is_safe(value.left) and _is_safe(value.right)
    if isinstance(value, ast.IfExp):
        return _is_safe(value.body) and _is_safe(value.orelse)
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        if name in ("visible", "for_output", "format_seconds", "len", "_gib", "gib") or name.endswith("join"):
            return True
    return ast.unparse(value) in _OWN


def test_whatever_the_package_prints_is_escaped():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(tuple(_ESCAPED_BEFORE)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "traceback.print_exc"):
                is_safe = node.args and all(_is_safe(value) for value in node.args)
                if not is_safe and ast.unparse(node) != "print()":
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


class Tokenizer:
    """Token ids are characters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def _written(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    writer = generate.Writer(Tokenizer())
    for code in map(ord, "a\tb\n\x1b[2J\r\u202e"):
        writer.take(0, code)
    writer.finish()
    stream.flush()


def test_what_a_model_writes_on_a_terminal_and_into_a_pipe(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        _written(monkeypatch, stream)
        data = b""
        while not data.endswith(b"u202e\r\n"):  # a terminal returns partial reads
            data += os.read(leader, 1000)
    shown = data.decode()
    monkeypatch.undo()
    assert shown.replace("\r\n", "\n") == "a\tb\n\\x1b[2J\\r\\u202e\n"
    os.close(leader)
    pipe = io.StringIO()
    _written(monkeypatch, pipe)
    monkeypatch.undo()
    assert pipe.getvalue() == "a\tb\n\x1b[2J\r\u202e\n", "the output must be unchanged"


def test_tags(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.log(1, {f"kl/{EVIL}": 0.5})
    writer.close()
    (tag,) = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert_harmless(tag, lines=0)
    assert not ACTS.search((tmp_path / "metrics.jsonl").read_text())
    from megatron_mopd.observe.weights_and_biases import WeightsAndBiases

    sent = []
    tracker = WeightsAndBiases.__new__(WeightsAndBiases)
    tracker._run = types.SimpleNamespace(log=lambda numbers, step: sent.extend(numbers))
    tracker.log(1, {f"kl/{EVIL}": 0.5})
    assert_harmless(sent[0], lines=0)


@pytest.fixture
def run(tmp_path):
    """A run in which every name and text is hostile."""
    directory = tmp_path / EVIL_PAGE.replace("/", "∕").replace("\n", "")
    directory.mkdir()
    lines = []
    for i in (1, 2):
        values = {
            f"{kind}/{EVIL_PAGE}": 0.5 / i for kind in ("kl", "accuracy", "reward", "length", "time", "idle")
        }
        values |= {f"teacher/{EVIL_PAGE}/kl": 0.5, f"pass_at_4{EVIL_PAGE}": 1.0, "loss": 1.0 / i}
        lines.append(json.dumps({"iteration": i, **values}))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "config.yaml").write_text(
        json.dumps({"routing": {EVIL_PAGE: {EVIL_PAGE: 1.0}}, "x": EVIL_PAGE})
    )
    (directory / "alarms.jsonl").write_text(json.dumps({"iteration": 1, "message": EVIL_PAGE}) + "\n")
    sample = dict.fromkeys(("domain", "prompt", "answer"), EVIL_PAGE)
    sample |= {"iteration": 1, "tokens": [EVIL_PAGE, "\x1b"], "kl": [0.1, 0.2], "teachers": {EVIL_PAGE: 1}}
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    prints = {"weights": EVIL_PAGE}
    facts = {
        "device": EVIL_PAGE,
        "versions": {EVIL_PAGE: EVIL_PAGE},
        "manifest": {"teachers": {EVIL_PAGE: prints}},
    }
    (directory / "run.json").write_text(json.dumps(facts))
    events = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": EVIL_PAGE}}]
    forward = {
        "ph": "X",
        "ts": 0.0,
        "dur": 1e6,
        "tid": 0,
        "pid": 0,
        "cat": "StudentForward",
        "name": EVIL_PAGE,
    }
    (directory / "timeline.json").write_text(json.dumps({"traceEvents": [*events, forward]}))
    return directory


def test_the_page(run):
    text = write_page(run, base=run, experts={EVIL_PAGE: run}).read_text()
    assert not ACTS.search(text)
    assert "<script" not in text.lower() and "<img" not in text and "onerror=alert(1)>" not in text
    assert text.count("&lt;script&gt;") > 20 and "{{ 7 * 7 }}" in text and "&lt;img src=x" in text
    assert r"gcd\x1b]0;owned" in text


def test_pictures_in_the_page():
    seesaw = seesaw_chart([[0.5]], [EVIL_PAGE], [EVIL_PAGE], {EVIL_PAGE: EVIL_PAGE}, {})
    picture = svg.inline(seesaw, EVIL_PAGE)
    picture += svg.line_chart([Line(EVIL_PAGE, [(1, 2), (2, 3)], "red")], label=EVIL_PAGE)
    picture += svg.split_bar([(EVIL_PAGE, 1.0, "red")])
    box = Box(0, 0.0, 1.0, "red", EVIL_PAGE, EVIL_PAGE, False)
    picture += svg.timeline(Panel(EVIL_PAGE, [box], [0.0]), 1.0)
    assert picture.count("&lt;script&gt;") >= 8 and " id=" not in picture
    assert "<script" not in picture and not ACTS.search(picture) and "\n" not in picture


@pytest.mark.filterwarnings("error")
def test_pictures_of_names_with_formulas(tmp_path):
    """`$` starts a formula in matplotlib, and an invalid formula raises, after training."""
    name = r"$\frac{$ \x $a_$"
    line = {
        "iteration": 1,
        f"kl/{name}": 0.5,
        "kl": 0.5,
        f"accuracy/{name}": 0.5,
        f"time/{name}": 1.0,
        "loss": 1,
    }
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert pictures.draw_report(tmp_path / name).exists()
    pictures.draw_seesaw([[0.5]], [name], [f"{name}\x1b"], tmp_path / "seesaw.png", {}, {})

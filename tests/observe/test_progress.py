"""Progress: brief without a terminal, silent on other ranks, and never in the way of the iteration."""

import io
import time

import pytest

from megatron_mopd.observe import progress as module
from megatron_mopd.observe.progress import (
    StepLine,
    advance,
    format_count,
    format_seconds,
    phase,
    progress,
    sparkline,
)

METRICS = {
    "loss": 0.5,
    "kl": 0.1234567,
    "kl/gcd": 0.03,
    "kl/sort": 0.5,
    "kl/words": 0.2,
    "kl/bits": 0.01,
    "grad_norm": 0.917,
    "tokens_per_second": 12345.0,
    "time/rollout": 1.25,
    "time/student": 0.5,
    "response_length": 9.5,
    "accuracy": 0.875,
}


def test_short_phases_are_silent(capfd):
    assert list(progress(range(5), "sorting")) == list(range(5))
    assert capfd.readouterr() == ("", "")


def test_long_phases_leave_one_plain_line(capfd, monkeypatch):
    monkeypatch.setattr(module, "_LINE_AFTER_SECONDS", -1.0)
    assert list(progress(iter("abc"), "sampling")) == ["a", "b", "c"]
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("sampling: 3 in ") and err.count("\n") == 1 and "\x1b" not in err


def test_a_bar_on_a_terminal_is_stopped_when_the_loop_breaks(capfd, monkeypatch):
    monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setattr(module, "_BAR_AFTER_SECONDS", -1.0)
    for item in progress([1, 2, 3], "sampling"):
        if item == 2:
            break
    with pytest.raises(KeyError):
        for _ in progress([1, 2, 3], "sampling"):
            raise KeyError
    assert list(progress((x for x in "ab"), "sampling", total=2)) == ["a", "b"]


def test_phases_that_cannot_be_counted(capfd, monkeypatch):
    with phase("loading"):
        pass
    monkeypatch.setattr(module, "_LINE_AFTER_SECONDS", -1.0)
    with phase("sampling", often=True):
        pass
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError), phase("loading"):
        raise KeyError
    assert capfd.readouterr() == ("", "")
    with phase("loading"):
        pass
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("loading: ") and err.count("\n") == 1


def test_a_phase_on_a_terminal_is_shown_after_a_moment_and_gone_at_its_end(capfd, monkeypatch):
    bars = shown_bars(monkeypatch)
    with phase("saving"):
        pass
    assert bars == [], "too short to be shown"
    monkeypatch.setattr(module, "_BAR_AFTER_SECONDS", 0.0)
    with phase("saving"):
        wait_for(lambda: bars)
    ((bar, is_counted, happened),) = bars
    assert happened == ["start", "stop"] and [task.description for task in bar.tasks] == ["saving"]
    assert not is_counted and bar.tasks[0].total is None


def shown_bars(monkeypatch):
    """(bar, whether it counts, calls so far) of every bar from now on, with output treated as a terminal."""
    bars, make = [], module._bar

    def recorded(counted=True):
        bar, happened = make(counted), []
        bar.start, bar.stop = lambda: happened.append("start"), lambda: happened.append("stop")
        bars.append((bar, counted, happened))
        return bar

    monkeypatch.setattr(module, "_bar", recorded)
    monkeypatch.setattr(module, "is_terminal", lambda: True)
    return bars


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_phase_counts_what_goes_on_in_it(monkeypatch):
    """The bar shows how many responses are complete, then how many were verified."""
    bars = shown_bars(monkeypatch)
    advance(1, 2)  # no phase, so nothing is shown
    monkeypatch.setattr(module, "_BAR_AFTER_SECONDS", 0.05)
    with phase("evaluating"):
        advance(0, 8)
        wait_for(lambda: bars)
        ((bar, is_counted, _),) = bars
        (task,) = bar.tasks
        assert is_counted and (task.completed, task.total) == (0, 8)
        advance(5, 8)
        assert (task.completed, task.total) == (5, 8)
        monkeypatch.setattr(module, "_BAR_AFTER_SECONDS", -1.0)
        assert list(progress("abc", "verifying")) == ["a", "b", "c"]
        assert (task.completed, task.total) == (3, 3)
    assert len(bars) == 1


def test_curves_of_the_domains(monkeypatch):
    line = StepLine(total=100)
    for step in range(64):
        line.record({"kl": {"gcd": 2.0**-step, "sort": 1.0, "none": 0.0}})
    assert line.render(64, {"kl/gcd": 2.0**-63, "kl/sort": 1.0, "kl/none": 0.0}).plain == (
        "step  64/100  (sort 1▁▁▁▁▁▁▁▁ gcd 1.08e-19█▇▆▅▄▃▂▁ none 0)  ETA 0.0s"
    )
    assert sparkline([3.0]) == "" and sparkline([1.0, 100.0, 10.0]) == "▁█▅"
    monkeypatch.setattr(module.sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline([1.0, 2.0]) == ""


def test_what_a_gpu_and_a_pipeline_add():
    metrics = {"loss": 1.0, "tflops": 412.3, "mfu": 0.417, "idle/stage_0": 0.1, "idle/stage_1": 0.2}
    metrics |= {"reward/a": 0.25, "reward/b": 0.75}
    text = StepLine(9).render(9, metrics).plain
    assert text == "step 9/9  loss 1  reward 0.500  412 TFLOP/s (42%)  idle 15%"


def test_other_ranks_are_silent(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(module, "_LINE_AFTER_SECONDS", -1.0)
    assert list(progress([1, 2], "sampling")) == [1, 2]
    StepLine(10).show(1, METRICS)
    assert capfd.readouterr() == ("", "")


def test_step_line(capfd):
    line = StepLine(total=200, first_iteration=10)
    line._start -= 20.0  # ten steps of two seconds
    line.show(20, METRICS)
    out = capfd.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out
    for part in (
        "step  20/200",
        "kl 0.1235",
        "(sort 0.5 words 0.2 gcd 0.03 +1 lower)",
        "accuracy 87.5%",
        "grad 0.917",
        "len 9.5",
        "12.3k tok/s",
        "1.8s: rollout 71% student 29%",
        "ETA 6m 00s",
    ):
        assert part in out, part
    assert "loss" not in out


def test_step_line_with_little_to_say():
    assert StepLine(5).render(5, {"loss": 2.0, "kl": None, "grad_norm": None}).plain == "step 5/5  loss 2"


def test_nested_metrics_and_missing_values():
    text = StepLine(5).render(5, {"kl": {"gcd": 0.25, "sort": None}}).plain
    assert text == "step 5/5  (gcd 0.25)"


def test_formats():
    assert [format_seconds(s) for s in (4.21, 185, 7630)] == ["4.2s", "3m 05s", "2h 07m"]
    assert [format_count(n) for n in (950, 12345, 4.56e6, 7e9)] == ["950", "12.3k", "4.56M", "7G"]

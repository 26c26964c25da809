"""Verifiers: right answers, wrong ones, failures that are counted, and other threads."""

import signal
import threading
import time

import pytest
import reasoning_gym

from megatron_mopd.config import ConfigError
from megatron_mopd.data import verifiers
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.verifiers import Score, accuracy, check_verifier, final_answer, score, verify


def prompt(answer="7", verifier="exact_match", entry=None):
    return Prompt("question", (1,), "domain", answer, verifier, entry)


def task_prompt(name, **params):
    entry = reasoning_gym.create_dataset(name, seed=1, size=1, **params)[0]
    return prompt(entry["answer"], "reasoning_gym", {**entry, "params": params})


@pytest.mark.parametrize(
    "answer, response, expected",
    [
        ("a b", "  a\n b ", 1.0),
        ("a b", "ab", 0.0),
        ("a b", "", 0.0),
        ("7", "It is <answer>3</answer>, no, <answer> 7 </answer>", 1.0),
        ("7", "<think>7</think>8", 0.0),
        ("7", "<think>is it 8?</think>7", 1.0),
    ],
)
def test_exact_match(answer, response, expected):
    assert verify(prompt(answer), response) == expected


@pytest.mark.parametrize(
    "answer, response, expected",
    [
        ("1/2", "The answer is $\\frac{1}{2}$.", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("$\\frac{1}{2}$", "1/2", 1.0),
        ("\\boxed{42}", "so x is \\boxed{42}", 1.0),
        ("\\sqrt{2}", "\\sqrt{2}", 1.0),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", 1.0),
        ("42", "41", 0.0),
        ("42", "", 0.0),
        ("42", "no idea", 0.0),
        ("42", "$x^2+", 0.0),
    ],
)
def test_math_verify(answer, response, expected):
    assert verify(prompt(answer, "math_verify"), response) == expected


@pytest.mark.parametrize(
    "name", ["gcd", "decimal_arithmetic", "countdown", "spell_backward", "time_intervals"]
)
def test_reasoning_gym_own_scores(name):
    example = task_prompt(name)
    right = score(example, example.answer + "\n")
    assert right == Score(1.0) and right.correct is True
    wrong = score(example, "certainly not")
    assert wrong.raw < 1.0 and wrong.correct is False and not wrong.crashed


def test_partial_credit_is_kept_but_is_not_correct():
    example = task_prompt("gcd")
    partial = score(example, f"the answer {example.answer}")
    assert 0 < partial.raw < 1 and partial.correct is False


def test_scores_use_the_parameters_of_the_task():
    """The tolerance of decimal_arithmetic is one of its parameters."""
    coarse = task_prompt("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=2)
    fine = task_prompt("decimal_arithmetic", min_num_decimal_places=6, max_num_decimal_places=6)
    assert verify(coarse, coarse.answer) == verify(fine, fine.answer) == 1.0
    assert verify(fine, str(float(fine.answer) + 1e-3)) < 1.0


def test_crashes_give_none_and_are_counted(monkeypatch):
    def broken(prompt, answer):
        raise RecursionError if answer == "deep" else ValueError("bad")

    monkeypatch.setitem(verifiers.VERIFIERS, "exact_match", broken)
    monkeypatch.setitem(verifiers.VERIFIERS, "math_verify", lambda prompt, answer: float("nan"))
    scores = [score(prompt(), "deep"), score(prompt(), "x"), score(prompt(verifier="math_verify"), "x")]
    assert scores == [Score(None, crashed=True)] * 3
    assert verify(prompt(), "x") is None
    assert accuracy([*scores, Score(1.0), Score(0.5), Score(None)]) == (0.5, 2, 3)
    assert accuracy(scores) == (None, 0, 3)


def test_broken_reference_is_a_crash_not_a_zero():
    assert score(prompt("", "math_verify"), "3") == Score(None, crashed=True)
    assert score(prompt("x", "reasoning_gym", {"question": "?"}), "3") == Score(None, crashed=True)


def test_no_answer_is_no_verdict():
    assert score(prompt(None), "3") == Score(None, crashed=False)


def test_scores_are_clamped(monkeypatch):
    monkeypatch.setitem(verifiers.VERIFIERS, "exact_match", lambda prompt, answer: 3 if answer else -1)
    assert (verify(prompt(), "x"), verify(prompt(), "")) == (1.0, 0.0)


def on_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_math_verify_off_the_main_thread():
    """math-verify's own timeout is a signal, which only the main thread may set."""
    assert on_a_thread(lambda: score(prompt("1/2", "math_verify"), "0.5")) == Score(1.0)
    assert on_a_thread(lambda: score(prompt("1/2", "math_verify"), "0.4")) == Score(0.0)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_verifier_that_never_ends(monkeypatch, where):
    def endless(prompt, answer):
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # as a library's fallback would
                pass

    monkeypatch.setitem(verifiers.VERIFIERS, "exact_match", endless)
    monkeypatch.setattr(verifiers, "TIMEOUT_SECONDS", 0.1)
    call = lambda: score(prompt(), "x")  # noqa: E731
    assert (call() if where == "main" else on_a_thread(call)) == Score(None, crashed=True)


def test_alarms_of_others_survive():
    """math-verify's own timeout would cancel this one."""
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        verify(prompt("1/2", "math_verify"), "0.5")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, old)


def test_deadlines_leave_nothing_behind(monkeypatch):
    """A deadline that passes just as the verifier returns must not strike the code that follows."""
    monkeypatch.setitem(verifiers.VERIFIERS, "exact_match", lambda prompt, answer: time.sleep(0.002) or 1.0)
    monkeypatch.setattr(verifiers, "TIMEOUT_SECONDS", 0.002)
    seen = {score(prompt(), "x") for _ in range(200)}
    assert seen <= {Score(1.0), Score(None, crashed=True)}
    before = threading.active_count()
    time.sleep(0.05)
    assert threading.active_count() <= before


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(ConfigError, match="here: unknown verifier 'math_verfy'; did you mean 'math_verify'"):
        check_verifier("math_verfy", "here")


def test_final_answer():
    assert final_answer(" x \n") == "x"
    assert final_answer("<think>a</think> b <answer>c\nd</answer> e") == "c\nd"

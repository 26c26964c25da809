"""Verifiers: correct and wrong answers, failures that are counted, and other threads."""

import dataclasses
import os
import signal
import threading

import pytest
import reasoning_gym

from megatron_mopd.config import ConfigError
from megatron_mopd.data import verifiers
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.verifiers import (
    Score,
    check_verifier,
    final_answer,
    score,
    to_score,
)


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
    assert score(prompt(answer), response).raw == expected


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
    assert score(prompt(answer, "math_verify"), response).raw == expected


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
    assert score(coarse, coarse.answer).raw == score(fine, fine.answer).raw == 1.0
    assert score(fine, str(float(fine.answer) + 1e-3)).raw < 1.0


def test_crashes_give_none_and_are_counted(monkeypatch):
    class Broken:
        def score(self, requests, seconds):
            if requests[0][1] == "deep":
                raise RecursionError
            return [float("nan")]

    monkeypatch.setattr(verifiers, "_scoring_process", lambda process_id: Broken())
    scores = [
        score(prompt(verifier=name), text)
        for name in ("math_verify", "reasoning_gym")
        for text in ("deep", "x")
    ]
    assert scores == [Score(None, crashed=True)] * 4


def test_broken_reference_is_a_crash_not_a_zero():
    assert score(prompt("", "math_verify"), "3") == Score(None, crashed=True)
    assert score(prompt("x", "reasoning_gym", {"question": "?"}), "3") == Score(None, crashed=True)


def test_no_answer_is_no_verdict():
    assert score(prompt(None), "3") == Score(None, crashed=False)


def test_scores_are_clamped():
    assert (to_score(3.0), to_score(-1.0), to_score(0.5)) == (Score(1.0), Score(0.0), Score(0.5))


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


def test_an_answer_that_never_ends_is_given_up(monkeypatch):
    """One C call takes forever, and no signal or thread can end it. The next response is scored."""
    monkeypatch.setattr(verifiers, "TIMEOUT_SECONDS", 0.5)
    assert score(task_prompt("countdown"), "9**9**9**9") == Score(None, crashed=True)
    monkeypatch.setattr(verifiers, "TIMEOUT_SECONDS", 20.0)
    assert on_a_thread(lambda: score(prompt("1/2", "math_verify"), "$2^{-1}$")) == Score(1.0)


def test_a_forked_child_has_its_own_scoring_process():
    """Two readers of one pipe would take each other's replies."""
    own = verifiers._scoring_process(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0 if verifiers._scoring_process(os.getpid()) is not own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifiers._scoring_process(os.getpid()) is own


def test_alarms_of_others_survive():
    """math-verify's own timeout would cancel this alarm."""
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        score(prompt("1/2", "math_verify"), "0.5")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, old)


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(ConfigError, match="here: unknown verifier 'math_verfy'; did you mean 'math_verify'"):
        check_verifier("math_verfy", "here")


def test_final_answer():
    assert final_answer(" x \n") == "x"
    assert final_answer("<think>a</think> b <answer>c\nd</answer> e") == "c\nd"
    assert final_answer("<answer>a<answer>b</answer></answer>") == "a<answer>b"
    assert final_answer("<answer>a</answer><answer>b") == "a"
    assert final_answer("<answer>a</answer><answer></answer>") == ""
    assert final_answer("so 7 <think>or 8") == "so 7"
    assert final_answer("<think>a</think> 7 <think>or 8") == "7"
    assert final_answer("<think>7") is None
    assert final_answer("<think>a</think><think>7 <answer>7</answer>") is None
    assert final_answer("7", opens_thinking=True) is None
    assert final_answer("8?</think>7", opens_thinking=True) == "7"
    assert final_answer("8?</think><think>7", opens_thinking=True) is None


@pytest.mark.parametrize("response", ["<think>is it {}", "<think>no</think><think><answer>{}</answer>"])
def test_an_answer_inside_thinking_that_never_ends(response):
    """No verifier accepts an answer inside unfinished thinking; after `</think>` the same text is correct."""
    task = task_prompt("gcd")
    for example in (prompt("7"), prompt("7", "math_verify"), task):
        inside = response.format(example.answer)
        assert score(example, inside) == Score(0.0)
        assert score(example, f"{inside}</think>{example.answer}") == Score(1.0)
        opened = dataclasses.replace(example, opens_thinking=True)
        assert score(opened, f"{example.answer}") == Score(0.0)
        assert score(opened, f"hm</think>{example.answer}") == Score(1.0)

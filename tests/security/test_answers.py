"""A model's answers never run in the trainer, affect only their own score, and are scored in bounded time."""

import contextlib
import random
import time
from pathlib import Path

import pytest
import reasoning_gym

from megatron_mopd.confinement.expressions import is_expression
from megatron_mopd.data import scoring, verifiers
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.scoring_process import ScoringProcess
from megatron_mopd.data.verifiers import Score, final_answer, score

# Tasks whose scorers evaluate the answer with eval, parse_expr or literal_eval.
EVALUATING = [
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "number_sorting",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
]


def task_prompt(name, seed=1):
    entry = reasoning_gym.create_dataset(name, seed=seed, size=1)[0]
    return Prompt("", (1,), "d", entry["answer"], "reasoning_gym", {**entry, "params": {}}, 0, "p")


def math_prompt(answer):
    return Prompt("", (1,), "math", answer, "math_verify", None, 0, "p")


@pytest.fixture(scope="module")
def process():
    scoring = ScoringProcess()
    yield scoring
    scoring.close()


@pytest.mark.parametrize("task", EVALUATING)
def test_code_in_an_answer_is_not_run_and_the_next_answer_is_judged_as_ever(task, tmp_path):
    example = task_prompt(task)
    before = score(example, example.answer)
    wrong_before = score(example, "-1")
    trace = tmp_path / "ran"
    for code in (
        f"((__import__)('os').system)('touch {trace}')",
        f"[(open)('{trace}', 'w')]",
        "((__import__)('sys').modules['__main__'].SCORES.update)(reasoning_gym=(lambda *_: 1.0))",
        "((__import__)('reasoning_gym').dataset.ProceduralDataset.__setattr__)",
        "[(__import__)('os').write(f, b'\\x10\\x00\\x00\\x00{\"value\": 1.0}  ') for f in range(3, 12)]",
        "(exit)(0)",
        "(__import__)('os')._exit(0)",
        "(lambda: (yield))()",
    ):
        verdict = score(example, code)
        assert verdict.raw is None or verdict.raw < 1.0, code
    assert not trace.exists()
    assert score(example, example.answer) == before and before.correct
    assert score(example, "-1") == wrong_before and not wrong_before.correct


def test_every_verifier_but_exact_match_scores_in_the_confined_process(monkeypatch):
    asked = []

    class Recording:
        def score(self, requests, seconds):
            asked.extend(request[0] for request in requests)
            return [0.25] * len(requests)

    monkeypatch.setattr(verifiers, "_scoring_process", lambda process_id: Recording())
    assert score(math_prompt("4"), "4").raw == 0.25 and score(task_prompt("gcd"), "4").raw == 0.25
    assert asked == ["math_verify", "reasoning_gym"]
    exact = Prompt("", (1,), "d", "a b", "exact_match", None, 0, "p")
    assert score(exact, "a  b") == Score(1.0) and len(asked) == 2


# Used as answers and as references. Some finish quickly with this release of the libraries; none may exceed
# the limit.
ENDLESS = [
    "9**9**9**9",
    "$9^{9^{9^{9}}}$",
    "$" + "{" * 20 + "x" + "}" * 20 + "$",
    "$" + "(" * 60 + "x" + ")" * 60 + "$",
    "\\boxed{" * 40 + "1" + "}" * 40,
    "$10000000!!!$",
    "(10**10)!",
    "$\\frac{1}{" * 30 + "2" + "}$" * 30,
    "$" + "\\sqrt{" * 30 + "2" + "}" * 30 + "$",
    "$\\sum_{i=1}^{10^{12}} i!$",
    "1" * 200_000,
    "-" * 50_000 + "1",
]


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
def test_no_text_takes_longer_than_its_limit(text, process):
    limit = 0.4
    for request in (("math_verify", text, "7", None), ("math_verify", "7", text, None)):
        started = time.monotonic()
        assert process.score([request], limit)[0] in (None, 0.0)
        assert time.monotonic() - started < limit + 10, "far over the limit, even for a busy machine"
    assert process.score([("math_verify", "$\\frac{14}{2}$", "7", None)], 60.0) == [1.0]


def test_a_response_of_many_opening_tags_is_read_in_linear_time():
    """A lazy regular expression scans to the end of the text once per opening tag."""
    response = "<answer>" * 200_000
    started = time.monotonic()
    assert final_answer(response) == response
    assert final_answer(response + "</answer>") == "<answer>" * 199_999
    assert time.monotonic() - started < 30, "quadratic time would be about an hour"


@pytest.mark.parametrize(
    "text", ["1+2*3", "[1, 2.5, 'a']", "{'a': (1, -2)}", "Integer(2)**Symbol('x')", "x < 3"]
)
def test_pure_expressions(text):
    assert is_expression(text, pure=True) and is_expression(text, pure=False)


@pytest.mark.parametrize("text", ["erf(2)", "alpha + beta", "foo(1)(2)"])
def test_expressions_for_a_worker_of_its_own(text):
    assert not is_expression(text, pure=True) and is_expression(text, pure=False)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "(__import__)('os')",
        "ｅｖａｌ('1')",  # Python reads compatibility characters as the letters they stand for
        "().__class__",
        "x.y",
        "[i for i in (1,)]",
        "(i.gi_frame for i in ())",
        "lambda: 1",
        "(x := 1)",
        "f'{1}'",
        "import os",
        "1; import os",
        "def f(): pass",
        "x = 1",
        "eval('1')",
        "[exec]",
        "getattr(1, 'real')",
        "type('X', (), {})",
        "print(1)",
        "open('f')",
        "await x",
        "-_",
        "# coding: utf-7\n1",
        "[abs][0](1)",
        "1" * 200_000,
    ],
)
def test_more_than_an_expression_is_refused(text):
    assert not is_expression(text, pure=False) and not is_expression(text, pure=True)


@pytest.mark.parametrize(
    "text", ["certainly not a number", "(x", "1 + x +", "__import__('os') \\\n ", "x\0", "'x"]
)
def test_what_the_check_cannot_parse_nobody_may_compile(text):
    """The hook raises what the parser raises, so that the check and the compiler cannot read a text
    differently."""
    with contextlib.suppress(SyntaxError, ValueError):
        assert not is_expression(text, pure=True)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("text", ["(1)(2)", "(", "1 +", "'", "[1, 2]", "9**9"])
def test_text_without_letters_can_name_nothing_and_is_left_to_the_compiler(text):
    assert is_expression(text, pure=True)
    with contextlib.suppress(SyntaxError):
        assert compile(text, "<test>", "eval", optimize=0).co_names == ()


def test_what_is_allowed_compiles_to_code_that_only_calls_allowed_names():
    """Random texts: whatever passes has no attribute, import, nested code object or reserved name."""
    rng = random.Random(0)
    parts = "1 x Symbol abs __import__ eval ( ) [ ] , . : ' \" lambda for in if * ** + - = := import # f' {"
    parts = [*parts.split(), "\\\n", "\n"]
    passed = 0
    for _ in range(20_000):
        text = " ".join(rng.choice(parts) for _ in range(rng.randint(1, 8)))
        try:
            allowed = is_expression(text, pure=False)
        except (SyntaxError, ValueError):
            continue
        if not allowed:
            continue
        passed += 1
        for mode in ("eval", "exec"):
            try:
                code = compile(text.lstrip(" \t"), "<test>", mode)
            except SyntaxError:
                continue
            assert not set(code.co_names) - {"x", "Symbol", "abs", "__doc__"}, text
            assert not any(hasattr(constant, "co_code") for constant in code.co_consts), text
    assert passed > 100


def answers_of_all_kinds():
    """Right, wrong and rephrased math answers, and answers for the tasks whose scorers evaluate them."""
    for line in (Path(__file__).parent / "math_answers.txt").read_text().splitlines():
        reference, *given = line.split(" | ")
        yield from (("math_verify", answer, reference, None) for answer in given)
    for task in EVALUATING:
        entry = task_prompt(task).entry
        for answer in (
            entry["answer"],
            "1+2*x",
            "[1,2]",
            "x**2+sin(x)*exp(y)",
            "['a','b']",
            "erf(2)",
            "\n1 2\n3 4",
        ):
            yield "reasoning_gym", answer, entry["answer"], entry


def test_confinement_changes_no_verdict(process):
    """Not even where the libraries generate code themselves, which the check must allow."""
    requests = list(answers_of_all_kinds())
    differing = []
    for request, confined in zip(requests, process.score(requests, 60.0)):
        direct = scoring.SCORES[request[0]](*request[1:])  # these answers are trusted
        if confined != direct:
            differing.append((request[:3], direct, confined))
    assert not differing
    assert len(requests) > 190

"""Prompts: reading, checking, mixing in exact proportions, and the same batch on every rank and resume."""

import collections
import dataclasses
import json
import os
import subprocess
import sys

import pytest

from megatron_mopd.config import ConfigError, PromptSource
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.prompts import PromptSampler, PromptSet, load_prompts, require_answers
from megatron_mopd.data.reasoning_tasks import HASH_DEPENDENT, task_entries
from megatron_mopd.data.tokenizer import train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"Find the Greatest Common Divisor of {a} and {a * 7}." for a in range(100)]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("sp") / "t.model", 320)


@pytest.fixture
def load(tokenizer, tmp_path):
    """Loads one source, given as lines or as keywords."""

    def load(*lines, seq_length=256, **source):
        if lines:
            text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
            (tmp_path / "p.jsonl").write_text(text)
            source["path"] = str(tmp_path / "p.jsonl")
        return load_prompts([PromptSource(**source)], tokenizer, seq_length)

    return load


def prompt_set(sizes, weights):
    groups, index = [], 0
    for source, size in enumerate(sizes):
        group = [
            Prompt(f"{source}:{i}", (1,), f"d{source}", "a", "exact_match", None, index + i)
            for i in range(size)
        ]
        groups.append(tuple(group))
        index += size
    return PromptSet(tuple(groups), tuple(weights))


def test_jsonl(load, tokenizer):
    messages = [{"role": "user", "content": "hello", "name": "ignored"}]
    prompts = load(
        {"prompt": "one", "domain": "a", "answer": "1", "id": 7},
        "",
        {"prompt": messages, "domain": "b", "verifier": "math_verify", "answer": 2.5},
        {"prompt": "three", "domain": "a"},
    )
    one, two, three = prompts
    assert (one.text, one.domain, one.answer, one.verifier, one.entry) == (
        "one",
        "a",
        "1",
        "exact_match",
        None,
    )
    assert one.token_ids.tolist() == tokenizer.encode_prompt("one")
    assert two.text == ({"role": "user", "content": "hello"},)
    assert two.token_ids.tolist() == tokenizer.encode_prompt(two.text)
    assert (two.answer, two.verifier, three.answer) == ("2.5", "math_verify", None)
    assert [p.index for p in prompts] == [0, 1, 2]
    assert prompts.domains == ("a", "b") and len(prompts) == 3
    assert two.origin.endswith("p.jsonl:3")
    assert hash(two) != hash(one)


def test_source_settings_over_lines(load):
    line = {"prompt": "one", "domain": "a", "answer": "1"}
    assert next(iter(load(line, domain="b", verifier="math_verify"))).domain == "b"
    del line["domain"]
    assert next(iter(load(line, domain="b", verifier="math_verify"))).verifier == "math_verify"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "x", "domain": ', r"p\.jsonl:2: not valid JSON"),
        ("[1]", r"p\.jsonl:2: expected an object"),
        ({"domain": "a"}, r"p\.jsonl:2: `prompt` is missing"),
        ({"prompt": "x"}, r"p\.jsonl:2: `domain` is missing"),
        ({"prompt": "x", "domain": 3}, r"p\.jsonl:2: `domain` must be a name"),
        ({"prompt": 3, "domain": "a"}, r"p\.jsonl:2: `prompt` must be text"),
        ({"prompt": [], "domain": "a"}, r"p\.jsonl:2: `prompt` must be text"),
        ({"prompt": [{"role": "user"}], "domain": "a"}, r"p\.jsonl:2: message 0 of `prompt`"),
        ({"prompt": "x", "domain": "a", "answer": [1]}, r"p\.jsonl:2: `answer` must be text"),
        (
            {"prompt": "x", "domain": "a", "anwser": "1"},
            r"p\.jsonl:2: unknown key 'anwser'; did you mean",
        ),
        (
            {"prompt": "x", "domain": "a", "verifier": "math"},
            r"p\.jsonl:2: unknown verifier 'math'; did you mean",
        ),
        (
            {"prompt": "x", "domain": "a", "verifier": "reasoning_gym"},
            r"p\.jsonl:2: verifier `reas",
        ),
        ({"prompt": "divisor " * 300, "domain": "a"}, r"p\.jsonl:2: prompt of \d+ tokens leaves no room"),
        ({"prompt": "x", "domain": "  "}, r"p\.jsonl:2: `domain` must be a name"),
        # Valid JSON that is unusable.
        (
            '{"prompt": "a\\ud83d b", "domain": "a"}',
            r"p\.jsonl:2: `prompt` has half a character at position 1",
        ),
        ('{"prompt": "a", "domain": "\\udc00"}', r"p\.jsonl:2: `domain` has half a character"),
        ('{"prompt": "a", "domain": "a", "answer": "\\ud83d"}', r"p\.jsonl:2: `answer` has half a character"),
        (
            '{"prompt": [{"role": "user", "content": "\\ud83d"}], "domain": "a"}',
            r"p\.jsonl:2: message 0 of `prompt`: `content` has half",
        ),
        ('{"prompt": "a", "domain": "a", "answer": ' + 5000 * "1" + "}", r"p\.jsonl:2: .*write it as text"),
        ('{"prompt": "a", "domain": "a", "answer": 1e400}', r"p\.jsonl:2: `answer` is inf"),
        ('{"prompt": "a", "domain": "a", "answer": NaN}', r"p\.jsonl:2: `answer` is nan"),
        ('{"prompt": "a", "x": ' + 100_000 * "[" + 100_000 * "]" + "}", r"p\.jsonl:2: .*nested too deeply"),
        # Fields that a chat template would render and this package would drop.
        ({"prompt": "x", "domain": "a", "tools": [{"type": "function"}]}, r"p\.jsonl:2: `tools` is not supp"),
        (
            {"prompt": [{"role": "assistant", "content": "", "tool_calls": [{}]}], "domain": "a"},
            r"p\.jsonl:2: message 0 of `prompt`: `tool_calls` is not supported",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "domain": "a"},
            r"p\.jsonl:2: message 0 of `prompt`: `content` in parts is not supported",
        ),
        (
            {"prompt": [{"role": "usr", "content": "x"}], "domain": "a"},
            r"p\.jsonl:2: message 0 of `prompt`: unknown role 'usr'; did you mean 'user'",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
                "domain": "a",
            },
            r"p\.jsonl:2: the last message of `prompt` is the assistant's",
        ),
    ],
)
def test_bad_lines_are_named(load, line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load({"prompt": "fine", "domain": "a"}, line)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_ends_inside_thinking(load):
    """Some chat templates end the prompt with an open `<think>`."""
    texts = ["a <think>\n", "<think>a</think> b", "b", "c <think>d</think><think>"]
    prompts = load(*({"prompt": text, "domain": "a"} for text in texts))
    assert [p.opens_thinking for p in prompts] == [True, False, False, True]


def test_what_is_empty_is_not_left_out(load):
    messages = [{"role": "user", "content": "x", "tool_calls": None}]
    assert len(load({"prompt": messages, "domain": "a", "tools": [], "images": []})) == 1


def test_bytes_that_are_not_text(tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff", "domain": "a"}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: not UTF-8"):
        load_prompts([PromptSource(path=str(tmp_path / "p.jsonl"))], tokenizer, 64)


def test_length_leaves_room_for_one_token(load, tokenizer):
    line = {"prompt": "Find the Greatest", "domain": "a"}
    length = len(tokenizer.encode_prompt(line["prompt"]))
    assert len(load(line, seq_length=length + 1)) == 1
    with pytest.raises(ConfigError, match="leaves no room"):
        load(line, seq_length=length)


def test_a_pipe_is_refused_before_it_is_waited_for(load, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"data\.prompts\[0\]\.path: .*pipe\.jsonl is not a regular file"):
        load(path=str(tmp_path / "pipe.jsonl"))


def test_empty_file_and_missing_file(load):
    with pytest.raises(ConfigError, match=r"p\.jsonl: no prompts in this file"):
        load("", "  ")
    with pytest.raises(ConfigError, match=r"data\.prompts\[0\]\.path: cannot read nowhere\.jsonl"):
        load(path="nowhere.jsonl")


def test_bad_sources(load, tokenizer):
    with pytest.raises(ConfigError, match="no prompts; list at least one source"):
        load_prompts([], tokenizer, 64)
    with pytest.raises(ConfigError, match=r"give either `path`"):
        load()
    with pytest.raises(ConfigError, match=r"give either `path`"):
        load(path="a", task="gcd")
    with pytest.raises(
        ConfigError, match=r"\[0\]\.task: unknown reasoning-gym task 'gdc'; did you mean 'gcd'"
    ):
        load(task="gdc")
    with pytest.raises(ConfigError, match=r"'gcd' has no 'max_vlaue'; did you mean 'max_value'"):
        load(task="gcd", params={"max_vlaue": 3})
    with pytest.raises(ConfigError, match=r"params\.seed: set data\.prompts\[0\]\.seed instead"):
        load(task="gcd", params={"seed": 3})
    with pytest.raises(ConfigError, match=r"task 'gcd': .*max_value must be"):
        load(task="gcd", params={"min_value": 30, "max_value": 3})
    with pytest.raises(ConfigError, match=r"\[0\]\.size: must be from 1"):
        load(task="gcd", size=0)
    with pytest.raises(ConfigError, match=r"\[0\]\.weight: must be"):
        load(task="gcd", weight=-1.0)
    with pytest.raises(ConfigError, match="every source has weight 0"):
        load(task="gcd", weight=0.0, size=2)
    with pytest.raises(ConfigError, match=r"\[0\]\.verifier: unknown verifier 'exact'"):
        load(task="gcd", verifier="exact")
    with pytest.raises(ConfigError, match=r"\(task gcd\), prompt 0: prompt of \d+ tokens"):
        load(task="gcd", seq_length=5)


def test_reasoning_gym_task(load):
    prompts = list(load(task="gcd", params={"max_value": 50}, size=5, seed=3))
    assert len(prompts) == 5
    assert all(p.domain == "gcd" and p.verifier == "reasoning_gym" and p.answer.isdigit() for p in prompts)
    assert prompts[0].entry["params"] == {"max_value": 50}
    assert prompts == list(load(task="gcd", params={"max_value": 50}, size=5, seed=3))
    assert next(iter(load(task="gcd", size=1, domain="numbers"))).domain == "numbers"


def test_require_answers(load, tokenizer):
    require_answers(load({"prompt": "x", "domain": "a", "answer": ""}), tokenizer, 64)
    with pytest.raises(ConfigError, match=r"p\.jsonl:2: objective `sft` needs an `answer`"):
        require_answers(
            load({"prompt": "x", "domain": "a", "answer": "1"}, {"prompt": "x", "domain": "a"}), tokenizer, 64
        )
    with pytest.raises(
        ConfigError, match=r"p\.jsonl:1: prompt and answer have \d+ tokens, data.seq_length is 64"
    ):
        require_answers(load({"prompt": "x", "domain": "a", "answer": "1 " * 80}), tokenizer, 64)


def test_fingerprint_sees_answers_and_order(load):
    lines = [{"prompt": "x", "domain": "a", "answer": "1"}, {"prompt": "y", "domain": "a", "answer": "2"}]
    first = load(*lines).fingerprint()
    assert load(*lines).fingerprint() == first
    assert load(*lines[::-1]).fingerprint() != first
    assert load(lines[0], {**lines[1], "answer": "3"}).fingerprint() != first


def test_prompts_do_not_depend_on_string_hashing():
    """Ranks are separate processes, and Python orders sets of strings differently in each."""
    script = (
        "import reasoning_gym; dataset = reasoning_gym.create_dataset('ransom_note', seed=2**20, size=2);"
    )
    script += "print([entry['question'] for entry in dataset])"
    fixed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    entries = task_entries(PromptSource(task="ransom_note", seed=1, size=2), "here")
    assert str([entry["question"] for entry in entries]) == fixed.stdout.strip()
    assert "ransom_note" in HASH_DEPENDENT


def test_seeds_share_no_prompts(load):
    """reasoning-gym's own seeds 3 and 4 have all but one of their prompts in common."""
    texts = [{p.text for p in load(task="gcd", size=40, seed=seed)} for seed in (3, 4)]
    assert texts[0].isdisjoint(texts[1])
    for seed in (-1, 10**6):
        with pytest.raises(ConfigError, match=r"\[0\]\.seed: must be from 0 to 4094"):
            load(task="gcd", seed=seed)


def test_without_training_prompts(load):
    lines = [{"prompt": name, "domain": "a"} for name in "wxyz"]
    held_out, train = load(*lines), load(*lines[:2])
    assert [(p.text, p.index) for p in held_out.without(train)] == [("y", 2), ("z", 3)]
    with pytest.raises(
        ConfigError, match=r"p\.jsonl:1: every prompt of this source is also a training prompt"
    ):
        train.without(held_out)


def test_a_failing_task_process_is_one_line(load):
    with pytest.raises(ConfigError, match=r"task 'word_ladder': .*min_word_length") as caught:
        load(task="word_ladder", params={"min_word_length": 9, "max_word_length": 3})
    assert "\n" not in str(caught.value)


# ---- sampling ----


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (3, 1, 0), (1e-3, 1, 7), (1,) * 12])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_shares_are_exact_over_the_run(weights, size):
    sampler = PromptSampler(prompt_set([7] * len(weights), weights), seed=1)
    counts, previous = collections.Counter(), None
    for iteration in range(40):
        batch = sampler.batch(iteration, size)
        assert len(batch) == size
        counts.update(p.domain for p in batch)
        total = (iteration + 1) * size
        for source, weight in enumerate(weights):
            assert abs(counts[f"d{source}"] - total * weight / sum(weights)) <= 1 + len(
                weights
            ) / 2 * weight / sum(weights)
        assert batch != previous or size == 1
        previous = batch
    assert counts["d2"] == 0 if len(weights) > 2 and weights[2] == 0 else True


def test_shares_of_domains_are_those_of_their_sources_and_prompts():
    first, second = prompt_set([4, 10], (3, 1)).groups
    rare = dataclasses.replace(first[0], domain="rare")
    prompts = PromptSet(((rare, *first[1:]), second), (3, 1))
    assert prompts.domain_shares() == pytest.approx({"rare": 3 / 16, "d0": 9 / 16, "d1": 1 / 4})


def test_shares_are_exact_in_every_batch_that_allows_it():
    sampler = PromptSampler(prompt_set([9, 9, 9], (2, 1, 1)), seed=0)
    for iteration in range(20):
        assert collections.Counter(p.domain for p in sampler.batch(iteration, 8)) == {
            "d0": 4,
            "d1": 2,
            "d2": 2,
        }


def test_epochs_without_replacement_and_reshuffled():
    sampler = PromptSampler(prompt_set([10, 4], (1, 1)), seed=5)
    drawn = [p for iteration in range(20) for p in sampler.batch(iteration, 4)]
    for source, size in ((0, 10), (1, 4)):
        own = [p.index for p in drawn if p.domain == f"d{source}"]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_is_a_pure_function_of_seed_and_iteration():
    prompts = prompt_set([10, 4, 33], (1, 0.3, 2))
    sampler = PromptSampler(prompts, seed=5)
    run = [sampler.batch(iteration, 6) for iteration in range(30)]
    assert PromptSampler(prompts, seed=5).batch(23, 6) == run[23]  # resumed
    assert sampler.batch(2, 6) == run[2]  # out of order
    assert [b for i in range(30) for b in PromptSampler(prompts, seed=6).batch(i, 6)] != [
        b for r in run for b in r
    ]
    assert PromptSampler(prompts, seed=-1).batch(0, 6)
    # The same draws whatever the batch size: a batch of 12 is two batches of 6.
    assert sampler.batch(3, 12) == run[6] + run[7]


def test_resuming_late_is_cheap():
    sampler = PromptSampler(prompt_set([50] * 12, [0.1 * i for i in range(12)]), seed=5)
    assert len(sampler.batch(10**6, 256)) == 256

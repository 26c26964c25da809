"""Downloaded tokenizers and chat templates cannot hang, exhaust memory or run code; prompts are bounded."""

import json
import os
import time

import psutil
import pytest
import transformers

from megatron_mopd.config import ConfigError, PromptSource
from megatron_mopd.confinement.budget import within
from megatron_mopd.data import tokenizer as tokenizer_module
from megatron_mopd.data.prompts import load_prompts
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.data.tokenizer_files import check_tokenizer_files
from tests.data.test_tokenizer import build_huggingface

MESSAGES = [{"role": "user", "content": "Grüße, 1 + 1 = ?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build_huggingface(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def copy(directory, tmp_path):
    """Copy the tokenizer with another chat template, or with changes to `tokenizer.json`."""

    def make(chat_template=None, change=None):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(str(tmp_path))
        if change is not None:
            content = json.loads((tmp_path / "tokenizer.json").read_text())
            change(content)
            (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_a_template_is_rendered_as_transformers_does_and_not_in_this_process(directory, monkeypatch):
    tokenizer = load_tokenizer(directory)
    expected = transformers.AutoTokenizer.from_pretrained(str(directory)).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    monkeypatch.setattr(
        transformers.utils.chat_template_utils, "render_jinja_template", lambda *_, **__: pytest.fail("here")
    )
    monkeypatch.setattr(
        transformers.tokenization_utils_base, "render_jinja_template", lambda *_, **__: pytest.fail("here")
    )
    assert tokenizer.encode_prompt(MESSAGES) == tokenizer.encode(expected)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "no answer within",
        ),
        ("{{ ('a' * 2000000000) ~ ('b' * 2000000000) ~ ('c' * 2000000000) }}", "Memory|died|memory"),
        (
            "{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
            "Memory|died|memory|within",
        ),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|TypeError|unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|Undefined|unsafe"),
        ("{{ raise_exception('no system prompt, please') }}", "no system prompt, please"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 'a' * 100000000 }}", "too long"),
    ],
    ids=["loop", "memory", "doubling", "class", "globals", "own error", "syntax", "long"],
)
def test_a_hostile_template_is_one_line(template, message, copy, monkeypatch):
    if "endfor" in template:
        monkeypatch.setattr(tokenizer_module, "_RENDER_SECONDS", 0.5)
    tokenizer = load_tokenizer(copy(template))
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=f"chat template: .*({message})") as refused:
        tokenizer.encode_prompt(MESSAGES)
    assert "\n" not in str(refused.value)
    assert psutil.Process().memory_info().rss - before < 1 << 28


def test_a_panic_of_the_tokenizer_is_an_error_of_the_configuration(copy):
    """A Rust panic is not an `Exception`: no handler caught it, and the rank ended with a traceback."""

    def change(content):
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = split

    tokenizer = load_tokenizer(copy(change=change))
    with pytest.raises(ConfigError, match="encoding a text of 41: .*PanicException.*damaged or hostile"):
        tokenizer.encode("a" * 40 + "!")


def test_a_text_that_takes_too_long_is_given_up(copy, monkeypatch):
    """Each word stays below the limit of the regular expression library, but all together take hours."""

    def change(content):
        pattern = {"Regex": "(?:(a+)+$)|(?:(b+)+c|b)"}
        content["pre_tokenizer"] = {
            "type": "Split",
            "pattern": pattern,
            "behavior": "Isolated",
            "invert": False,
        }

    tokenizer = load_tokenizer(copy(change=change))
    monkeypatch.setattr(tokenizer_module, "_TEXT_SECONDS", 0.3)
    with pytest.raises(ConfigError, match="encoding a text of 2200: not done after 0.3 s"):
        tokenizer.encode(("b" * 21 + "d") * 100)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_replacements_of_replacements_are_refused(part, copy):
    def change(content):
        steps = [{"type": "Replace", "pattern": {"String": "Q"}, "content": "QQ"}] * 40
        content[part] = {"type": "Sequence", f"{part}s": [*steps, content[part]] if content[part] else steps}

    with pytest.raises(ConfigError, match=r"replacements turn one character into 1.1e\+12"):
        load_tokenizer(copy(change=change))


def test_ordinary_replacements_are_not(tmp_path):
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    content = {"normalizer": {"type": "Sequence", "normalizers": steps}, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_tokenizer_files(tmp_path)


def test_a_token_of_megabytes_is_refused(copy):
    def change(content):
        content["model"]["vocab"]["x" * 3_000_000] = len(content["model"]["vocab"])

    with pytest.raises(ConfigError, match="a token of 3000000 characters"):
        load_tokenizer(copy(change=change))


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "[1]", '{"normalizer": 3}', '{"normalizer": {"type": "Replace"}}']
)
def test_a_tokenizer_file_of_another_shape_is_one_line(content, copy):
    path = copy()
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="not a usable tokenizer directory") as refused:
        load_tokenizer(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "tokenizer_config.json"])
def test_a_file_of_gigabytes_is_refused_unread(name, copy):
    path = copy()
    with open(path / name, "ab") as file:
        file.truncate(6 << 30)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"{name}: 6442 MB is too large"):
        load_tokenizer(path)
    assert time.monotonic() - started < 30


def test_a_device_or_a_pipe_in_place_of_a_file_is_refused_unread(copy):
    path = copy()
    (path / "tokenizer.json").unlink()
    os.mkfifo(path / "tokenizer.json")
    with pytest.raises(ConfigError, match="tokenizer.json is not a regular file"):
        load_tokenizer(path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="tokenizer.json leads out of the model's directory, to /dev/zero"):
        load_tokenizer(path)


def test_a_sentencepiece_model_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(ConfigError, match="6442 MB is too large"):
        load_tokenizer(tmp_path)


def test_a_prompt_line_of_gigabytes_is_refused_unread(directory, tmp_path):
    path = tmp_path / "prompts.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"prompt": "a", "domain": "d"}\n{"prompt": "')
        file.truncate(6 << 30)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=r"prompts.jsonl:2: a line of more than 16 MiB"):
        load_prompts([PromptSource(path=str(path))], load_tokenizer(directory), 128)
    assert psutil.Process().memory_info().rss - before < 1 << 29


@pytest.mark.parametrize(
    "line", ['{"prompt": ' + "[" * 100_000, '{"prompt": "a", "answer": ' + "9" * 5000 + "}"]
)
def test_json_that_python_cannot_hold_is_an_error_with_its_line(line, directory, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"prompts.jsonl:1: not (readable as|valid) JSON"):
        load_prompts([PromptSource(path=str(path))], load_tokenizer(directory), 128)


def test_within():
    assert within(60, pow, 2, 3) == 8
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)
    with pytest.raises(TimeoutError):
        within(0.05, time.sleep, 5)
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        within(60, exit, 3)

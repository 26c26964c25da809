"""Tokenizer fingerprints: equal for tokenizers that behave the same, however they are stored; messages name
the differences of others."""

import json
import re
import shutil

import pytest
import transformers

from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mopd.data.tokenizer_meaning import differences, remarks
from tests.data.test_tokenizer import TEMPLATE, TEXTS, build_huggingface


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build_huggingface(tmp_path_factory.mktemp("original"))


@pytest.fixture
def copy(original, tmp_path):
    """A copy whose `tokenizer.json` and `tokenizer_config.json` are changed by functions."""

    def make(change=unchanged, configure=unchanged, **layout):
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(original, directory)
        for name, function in (("tokenizer.json", change), ("tokenizer_config.json", configure)):
            content = json.loads((directory / name).read_text())
            function(content)
            (directory / name).write_text(json.dumps(content, **layout))
        return load_tokenizer(directory)

    return make


def as_an_older_release(content):
    """Rewrite `tokenizer.json` as older releases of `tokenizers` wrote it."""
    model = content["model"]
    for default in ("ignore_merges", "byte_fallback", "fuse_unk", "dropout", "unk_token"):
        model.pop(default, None)
    model["continuing_subword_prefix"] = model["end_of_word_suffix"] = ""
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    for part in ("pre_tokenizer", "decoder"):
        content[part].pop("use_regex", None)
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    for key in sorted(content, reverse=True):
        content[key] = content.pop(key)
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip


def template_inside(directory):
    def configure(config):
        template = directory / "chat_template.jinja"
        config["chat_template"] = template.read_text()
        config |= {"padding_side": "left", "model_max_length": 77, "clean_up_tokenization_spaces": True}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"

    return configure


def test_a_tokenizer_that_another_release_wrote_is_the_same(original, copy, tmp_path):
    expected = load_tokenizer(original).fingerprint()
    older = copy(as_an_older_release, template_inside(original), indent=7)
    assert older.fingerprint() == expected
    transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint() == expected
    assert differences(older.meaning(), load_tokenizer(original).meaning()) == []


@pytest.mark.parametrize("saved", [False, True], ids=["loaded", "converted"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_sentencepiece_model_and_its_conversion_are_the_same(tokenizer_class, saved, tmp_path):
    train_sentencepiece(TEXTS, tmp_path / "model" / "tokenizer.model", 320)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "model", both)
    (both / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, "eos_token": "</s>", "unk_token": "<unk>"})
    )
    if saved:  # tokenizer.json next to tokenizer.model
        transformers.AutoTokenizer.from_pretrained(both).save_pretrained(both)
    alone, converted = load_tokenizer(tmp_path / "model"), load_tokenizer(both)
    assert type(alone) is not type(converted)
    assert differences(converted.meaning(), alone.meaning()) == []
    assert converted.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize(
    "template",
    [TEMPLATE + "\n", TEMPLATE.replace("{% for", "{# every message #}{%   for"), TEMPLATE.replace("'", '"')],
    ids=["newline", "comment", "quotes"],
)
def test_a_template_that_means_the_same(template, original, copy, tmp_path):
    ours = load_tokenizer(original)
    copy()
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    theirs = load_tokenizer(tmp_path / "copy")
    assert theirs.fingerprint() == ours.fingerprint()
    assert differences(theirs.meaning(), ours.meaning()) == []
    (remark,) = remarks(theirs.meaning(), ours.meaning())
    assert "newline" in remark or "line 1 of its chat template" in remark


def unchanged(content):
    pass


def swap(content, first, second):
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def digits_apart(content):
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}


def to_lower(content):
    content["normalizer"] = {"type": "Lowercase"}


def make_ordinary(content):
    next(token for token in content["added_tokens"] if token["content"] == "<|user|>")["special"] = False


def drop_merge(content):
    content["model"]["merges"].pop()


def other_end(config):
    config["eos_token"] = "<|user|>"


@pytest.mark.parametrize(
    "change, configure, message",
    [
        (lambda c: swap(c, "!", "7"), None, r"id \d+ is '7', not '!' \(and 1 more ids differ\)"),
        (drop_merge, None, "text is tokenized differently: "),
        (digits_apart, None, "text is tokenized differently: "),
        (to_lower, None, "text is tokenized differently: "),
        (make_ordinary, None, r"token 3 '<\|user\|>' is not a special token"),
        (None, other_end, r"its end-of-sequence token is 3 '<\|user\|>', not 1 '</s>'"),
    ],
    ids=["swapped", "merge", "digits", "lowercase", "ordinary", "eos"],
)
def test_what_differs_is_said(change, configure, message, original, copy):
    theirs, ours = copy(change or unchanged, configure or unchanged), load_tokenizer(original)
    assert theirs.fingerprint() != ours.fingerprint()
    (found,) = differences(theirs.meaning(), ours.meaning())
    assert re.match(message, found)
    assert remarks(theirs.meaning(), ours.meaning()) == []


def test_added_tokens_and_templates_that_differ(original, tmp_path):
    ours = load_tokenizer(original)
    template = TEMPLATE.replace("<|assistant|>", "<|assistant|>\\n")
    theirs = load_tokenizer(build_huggingface(tmp_path / "other", chat_template=template))
    (found,) = differences(theirs.meaning(), ours.meaning())
    there, here = "'...ssistant|>\\\\n{% endif %}'", "'...ssistant|>{% endif %}'"
    assert found == f"line 1 of its chat template is {there}, not {here}"
    without = load_tokenizer(build_huggingface(tmp_path / "without", chat_template=None))
    assert differences(without.meaning(), ours.meaning()) == ["it has no chat template"]
    larger = transformers.AutoTokenizer.from_pretrained(original)
    larger.add_tokens(["<think>"])
    larger.save_pretrained(tmp_path / "larger")
    (found,) = differences(load_tokenizer(tmp_path / "larger").meaning(), ours.meaning())
    assert found == f"id {ours.vocab_size} is '<think>', and no token here"

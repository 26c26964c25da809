"""Tokenizers: round trips, special tokens, chat templates, fingerprints, saving, and invalid directories."""

import json
import random
import shutil

import pytest
import tokenizers
import transformers

from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [f"Find the  GCD of {a},\n\t{a * 7 % 1000}.\nGive only the answer: " for a in range(300)]


def build_huggingface(directory, *, bos=False, pad=True, eos="</s>", chat_template=TEMPLATE, extra=()):
    """A byte-level BPE tokenizer, trained here and saved as `transformers` saves one."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", *extra]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token="<pad>" if pad else None
    )
    fast.chat_template = chat_template
    fast.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "demo.model"
    train_sentencepiece(TEXTS, path, 320)
    return path


@pytest.fixture(scope="module")
def huggingface_directory(tmp_path_factory):
    return build_huggingface(tmp_path_factory.mktemp("hf"))


@pytest.fixture(params=["sentencepiece", "huggingface"])
def path(request, sentencepiece_file, huggingface_directory):
    return sentencepiece_file if request.param == "sentencepiece" else huggingface_directory


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "a  b\n\n c\t", " lead and trail ", "1234567890", "é 漢字 🙂", *TEXTS[:5]]
)
def test_round_trip(path, text):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert isinstance(tokenizer.vocab_size, int)


def test_special_tokens_are_not_decoded(path):
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([*tokenizer.encode("answer 7"), tokenizer.eos_id, tokenizer.pad_id]) == "answer 7"


def test_digits_are_single_tokens(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    assert len(tokenizer.encode("7301")) == 4


def test_sentencepiece_special_ids_and_prompt(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert tokenizer.encode_prompt("Find") == [2, *tokenizer.encode("Find")]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    expected = tokenizer.encode("system: Be brief.\nuser: 1 + 1\nassistant: ")
    assert tokenizer.encode_prompt(messages) == [2, *expected]


def test_sentencepiece_training_is_deterministic(sentencepiece_file, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "new" / "again.model", 320)
    assert (tmp_path / "new" / "again.model").read_bytes() == sentencepiece_file.read_bytes()
    assert again.fingerprint() == load_tokenizer(sentencepiece_file).fingerprint()
    assert again.vocab_size <= 320


def test_sentencepiece_vocabulary_too_small(tmp_path):
    with pytest.raises(ConfigError, match="SentencePiece training failed"):
        train_sentencepiece(TEXTS, tmp_path / "small.model", 100)


def test_long_texts_are_not_left_out(tmp_path):
    words = "".join(random.Random(0).choices("abcdefgh ", k=20_000)) + " zebra" * 200
    tokenizer = train_sentencepiece([words], tmp_path / "long.model", 400)
    assert len(tokenizer.encode(" zebra")) <= 2


def test_huggingface_chat_template(huggingface_directory):
    tokenizer = load_tokenizer(huggingface_directory)
    ids = tokenizer.encode_prompt([{"role": "user", "content": "Find"}])
    vocab = transformers.AutoTokenizer.from_pretrained(str(huggingface_directory)).get_vocab()
    assert ids == [vocab["<|user|>"], *tokenizer.encode("Find"), vocab["</s>"], vocab["<|assistant|>"]]
    assert tokenizer.vocab_size == max(vocab.values()) + 1


def test_bos_only_where_the_tokenizer_uses_it(huggingface_directory, tmp_path):
    assert load_tokenizer(huggingface_directory).bos_id is None
    tokenizer = load_tokenizer(build_huggingface(tmp_path, bos=True))
    assert tokenizer.bos_id is not None
    assert tokenizer.encode_prompt("Find") == [tokenizer.bos_id, *tokenizer.encode("Find")]
    assert tokenizer.bos_id not in tokenizer.encode("Find")


def test_pad_falls_back_to_eos(tmp_path):
    tokenizer = load_tokenizer(build_huggingface(tmp_path, pad=False))
    assert tokenizer.pad_id == tokenizer.eos_id


def test_missing_eos_and_missing_template(tmp_path):
    with pytest.raises(ConfigError, match="end-of-sequence"):
        load_tokenizer(build_huggingface(tmp_path / "eos", eos=None))
    tokenizer = load_tokenizer(build_huggingface(tmp_path / "template", chat_template=None))
    with pytest.raises(ConfigError, match="chat template"):
        tokenizer.encode_prompt([{"role": "user", "content": "Find"}])


def test_template_that_refuses_messages(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load_tokenizer(build_huggingface(tmp_path, chat_template=template))
    with pytest.raises(ConfigError, match="roles must alternate"):
        tokenizer.encode_prompt([{"role": "user", "content": "Find"}])


def test_saved_tokenizer_is_the_same(path, tmp_path):
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "a")
    copy = load_tokenizer(tmp_path / "a")
    copy.save(tmp_path / "a")  # onto itself: harmless
    again = load_tokenizer(tmp_path / "a")
    messages = [{"role": "user", "content": "Find 12"}]
    for other in (copy, again):
        assert other.fingerprint() == tokenizer.fingerprint()
        assert other.encode_prompt(messages) == tokenizer.encode_prompt(messages)
        assert (other.eos_id, other.pad_id, other.bos_id) == (
            tokenizer.eos_id,
            tokenizer.pad_id,
            tokenizer.bos_id,
        )


def test_saving_keeps_the_config_of_a_model_beside_it(huggingface_directory, tmp_path):
    shutil.copytree(huggingface_directory, tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text('{"model_type": "qwen3"}')
    tokenizer = load_tokenizer(tmp_path / "source")
    tokenizer.save(tmp_path / "target")
    tokenizer.save(tmp_path / "fresh")
    assert "qwen3" in (tmp_path / "target" / "config.json").read_text()
    assert "llama" in (tmp_path / "fresh" / "config.json").read_text()


def test_fingerprint_sees_content_not_layout(huggingface_directory, tmp_path):
    original = load_tokenizer(huggingface_directory).fingerprint()
    transformers.AutoTokenizer.from_pretrained(str(huggingface_directory)).save_pretrained(
        str(tmp_path / "resaved")
    )
    content = json.loads((tmp_path / "resaved" / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "resaved" / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert load_tokenizer(tmp_path / "resaved").fingerprint() == original
    changed = [
        build_huggingface(tmp_path / "template", chat_template=TEMPLATE + " "),
        build_huggingface(tmp_path / "vocab", extra=["<|tool|>"]),
        build_huggingface(tmp_path / "bos", bos=True),
    ]
    assert len({original, *(load_tokenizer(path).fingerprint() for path in changed)}) == 4


def test_bad_paths(tmp_path):
    for missing in ("", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="tokenizer not found"):
            load_tokenizer(missing)
    with pytest.raises(ConfigError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(ConfigError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="not a usable tokenizer directory") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_encode(huggingface_directory, tmp_path):
    """A tokenizer that loads but fails on the first text is refused before a run."""
    directory = shutil.copytree(huggingface_directory, tmp_path / "copy")
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="not a usable tokenizer directory"):
        load_tokenizer(directory)

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    fast.save_pretrained(tmp_path / "words")
    with pytest.raises(ConfigError, match="UNK"):
        load_tokenizer(tmp_path / "words")


def test_a_piece_that_is_not_text(sentencepiece_file, tmp_path):
    model = bytearray(sentencepiece_file.read_bytes())
    model[model.index("\u2581".encode())] = 0xB5
    (tmp_path / "damaged.model").write_bytes(model)
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "damaged.model")


def test_code_in_a_directory_is_never_run(huggingface_directory, tmp_path):
    shutil.copytree(huggingface_directory, tmp_path / "hf")
    config_file = tmp_path / "hf" / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    config_file.write_text(json.dumps(config))
    flag = tmp_path / "ran"
    (tmp_path / "hf" / "evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    with pytest.raises(ConfigError):
        load_tokenizer(tmp_path / "hf")
    assert not flag.exists()

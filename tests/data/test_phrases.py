"""Phrases shared by a task's prompts, and a tokenizer that encodes them as single tokens."""

import random

from megatron_mopd.data.phrases import shared_phrases
from megatron_mopd.data.tokenizer import train_sentencepiece

PROMPTS = [f"Add the numbers {a} and {a * a % 997}. Give only the sum." for a in range(100, 160)]


def test_the_fixed_parts_are_found_and_what_varies_is_not_in_them():
    assert shared_phrases(PROMPTS) == [". Give only the sum.", "Add the numbers "]


def test_phrases_do_not_end_inside_words_or_numbers():
    """All prompts begin with 'number 1' and end in 'items', but 12 and 17 are not the number 1."""
    texts = [f"number 1{n} of {m}9 items" for n in range(10) for m in range(10)]
    for phrase in shared_phrases(texts, shortest=3):
        assert not phrase[-1:].isdigit() and not phrase[:1].isdigit(), phrase


def test_the_same_texts_give_the_same_phrases_and_few_texts_give_none():
    assert shared_phrases(PROMPTS, seed=3) == shared_phrases(PROMPTS, seed=3)
    assert shared_phrases(PROMPTS[:1]) == []


def test_rare_phrases_are_left_out():
    rare = ["Subtract one thing from another: " + text[4:] for text in PROMPTS[:1]]
    assert all("Subtract" not in phrase for phrase in shared_phrases(PROMPTS + rare))


def test_whole_pieces_are_one_token_each_and_text_survives(tmp_path):
    phrases = shared_phrases(PROMPTS)
    tokenizer = train_sentencepiece(PROMPTS, tmp_path / "t.model", 400, whole_pieces=phrases)
    prompt = random.Random(0).choice(PROMPTS)
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids) == prompt
    assert len(tokenizer.encode(phrases[0])) == len(tokenizer.encode(phrases[1])) == 1
    plain = train_sentencepiece(PROMPTS, tmp_path / "p.model", 400)
    assert len(ids) < len(plain.encode(prompt))

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from worker.sim import text
from worker.sim.words import WORDS

tokens = st.lists(st.integers(0, text.VOCAB_SIZE - 1), max_size=50)


@given(st.text())
def test_decoding_gives_back_what_was_encoded(said: str) -> None:
    assert text.decode(text.encode(said)) == said


@given(tokens)
def test_any_token_ids_are_text(ids: list[int]) -> None:
    assert isinstance(text.decode(ids), str)


@given(st.text(), st.text())
def test_a_longer_text_begins_with_the_same_tokens(said: str, more: str) -> None:
    whole = len(said.encode()) // 3
    assume("<|" not in said + more)
    assert text.encode(said + more)[:whole] == text.encode(said)[:whole]


def test_names_of_special_tokens_become_these_tokens() -> None:
    assert text.encode("<|im_start|>a<|im_end|>") == [text.IM_START, *text.encode("a"), text.EOS]


def test_half_a_surrogate_pair_does_not_fail() -> None:
    assert text.decode(text.encode("\ud800")) == "\ufffd" * 3


def test_a_token_is_at_most_three_bytes() -> None:
    assert len(text.encode("x" * 300)) == 100


def test_every_word_is_one_token_with_a_text_of_its_own() -> None:
    assert len(set(WORDS)) == len(WORDS) == 256
    spoken = set(islice(text.speak(b"\1" * 32), 5000))
    assert {text.decode([token]).strip() for token in spoken} == set(WORDS)


def test_other_prompts_get_other_answers() -> None:
    said = [tuple(islice(text.speak(text.digest_of(text.encode(f"prompt {n}"))), 8)) for n in range(100)]
    assert len(set(said)) == 100


def test_samples_of_one_prompt_differ() -> None:
    digest = text.digest_of([1, 2, 3])
    assert list(islice(text.speak(digest, b"1"), 8)) != list(islice(text.speak(digest, b"2"), 8))
    assert list(islice(text.speak(digest), 200)) == list(islice(text.speak(digest), 200))


@given(tokens.filter(lambda ids: text.EOS_NOW not in ids))
def test_answers_have_an_end(ids: list[int]) -> None:
    assert 8 <= text.answer_length(text.digest_of([*ids, text.EOS])) < 48


@given(st.text(min_size=1), st.integers(0, 60), st.binary(max_size=3))
def test_an_answer_goes_on_from_any_of_its_words(prompt: str, place: int, variant: bytes) -> None:
    ids = text.encode(prompt + "\n")
    whole = text.digest_of(ids)
    said = list(islice(text.speak(whole, variant), 70))
    assert text.encode(text.decode(said[:place])) == said[:place]
    rest = text.digest_of(ids + said[:place])
    assert list(islice(text.speak(rest, variant), 70 - place)) == said[place:]
    assert text.answer_length(rest) == max(0, text.answer_length(whole) - place)


def test_a_cache_of_another_part_of_the_answer_says_other_words() -> None:
    prompt = text.encode("What is prefill?")
    said = list(islice(text.speak(text.digest_of(prompt)), 10))
    assert text.digest_of(prompt + said[:4]) != text.digest_of(prompt + said[:5])


def test_the_marker_ends_the_answer_at_once() -> None:
    assert text.answer_length(text.digest_of(text.encode("Say nothing. <|eos_now|>"))) == 0


@pytest.mark.parametrize("asks", [True, False])
def test_the_chat_template(asks: bool) -> None:
    rendered = text.render_chat([("system", "Be kind."), ("user", "Hi")], add_generation_prompt=asks)
    turns = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert rendered == turns + "<|im_start|>assistant\n" * asks

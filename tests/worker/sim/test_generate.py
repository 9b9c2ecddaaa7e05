from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.sim import text
from worker.sim.generate import Choice, Piece
from worker.sim.protocol import Sampling

DIGEST = text.digest_of(text.encode("What is prefill?"))
LENGTH = text.answer_length(DIGEST)
NOTHING = text.digest_of(text.encode("<|eos_now|>"))


def pieces(digest: bytes = DIGEST, sample: int = 0, **sampling: Any) -> list[Piece]:
    choice = Choice(0, digest, Sampling(**({"max_tokens": 1000} | sampling)), sample)
    made = []
    while not choice.is_done:
        made.append(choice.next_piece())
    return made


def said(made: list[Piece]) -> str:
    return "".join(piece.text for piece in made)


WHOLE = said(pieces())


def test_an_answer_ends_by_itself() -> None:
    made = pieces()
    assert len(made) == LENGTH + 1
    assert made[-1] == Piece(0, text.EOS, "", "stop")
    assert len(WHOLE.split()) == LENGTH


def test_max_tokens() -> None:
    made = pieces(max_tokens=3)
    assert said(made).split() == WHOLE.split()[:3]
    assert [piece.finish for piece in made] == [None, None, "length"]


def test_max_tokens_is_where_the_answer_ends() -> None:
    assert pieces(max_tokens=LENGTH)[-1].finish == "length"
    assert pieces(max_tokens=LENGTH + 1)[-1].finish == "stop"


def test_ignore_eos() -> None:
    made = pieces(max_tokens=100, ignore_eos=True)
    assert len(said(made).split()) == 100
    assert made[-1].finish == "length"


def test_the_end_may_be_the_first_token() -> None:
    assert pieces(NOTHING) == [Piece(0, text.EOS, "", "stop")]
    assert pieces(NOTHING, max_tokens=1, ignore_eos=True)[0].finish == "length"
    assert len(pieces(NOTHING, min_tokens=4)) == 5


def test_min_tokens_is_kept_by_stops_too() -> None:
    first = WHOLE.split()[0]
    token = pieces()[0].token
    assert len(pieces(stops=(first,), min_tokens=5)) > 5
    assert len(pieces(stop_ids=frozenset([token]), min_tokens=5)) > 5


def test_a_stop_string() -> None:
    third = WHOLE.split()[2]
    made = pieces(stops=("nowhere", third))
    assert said(made) == WHOLE[: WHOLE.index(third)]
    assert (made[-1].finish, made[-1].stop) == ("stop", third)
    assert said(pieces(stops=(third,), keeps_stop=True)) == WHOLE[: WHOLE.index(third) + len(third)]


def test_a_stop_string_over_several_tokens() -> None:
    stop = " ".join(WHOLE.split()[2:5])
    for keeps in (True, False):
        made = pieces(stops=(stop,), keeps_stop=keeps)
        assert said(made) == WHOLE[: WHOLE.index(stop) + len(stop) * keeps]
        assert made[-1].stop == stop


def test_a_stop_token() -> None:
    third = pieces()[2]
    made = pieces(stop_ids=frozenset([third.token]))
    assert (len(made), said(made)) == (3, said(pieces()[:2]))
    assert made[-1] == Piece(0, third.token, "", "stop", third.token)
    assert said(pieces(stop_ids=frozenset([third.token]), keeps_stop=True)) == said(pieces()[:3])


@given(st.lists(st.text(min_size=1, max_size=9), max_size=3), st.integers(1, 60))
def test_what_is_held_back_is_said_in_the_end(stops: list[str], max_tokens: int) -> None:
    made = pieces(stops=tuple(stops), max_tokens=max_tokens)
    plain = said(pieces(max_tokens=max_tokens))
    found = [plain.find(stop) for stop in stops if stop in plain]
    assert said(made) == plain[: min(found)] if found else plain
    assert (made[-1].stop in stops) == bool(found)


def test_samples() -> None:
    sampling = Sampling(max_tokens=9, seed="1")
    assert sampling.variant(0) != sampling.variant(1) != replace(sampling, seed="2").variant(1)
    assert said(pieces(seed="1")) == said(pieces(seed="1")) != said(pieces(seed="1", sample=1))


def test_the_best_beam_is_the_greedy_answer() -> None:
    assert said(pieces(seed="None", is_beam=True)) == WHOLE != said(pieces(is_beam=True, sample=1))

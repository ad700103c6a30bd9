import pytest

from shardwise.parallel.text import TextStream


def stream(pieces, stop=()):
    """What comes out for each piece, the rest, and whether a stop was found."""
    text = TextStream(lambda token: pieces[token], stop)
    out = []
    for token in range(len(pieces)):
        out.append(text.push(token))
        if text.stopped:
            break
    return out, text.flush(), text.stopped


def test_text_without_stops_passes_at_once():
    assert stream(["a", "", "bc"]) == (["a", "", "bc"], "", False)


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none():
    assert stream(["one E", "N", "x"], ["END"]) == (["one ", "", "ENx"], "", False)


def test_a_stop_over_several_pieces_ends_the_text_before_it():
    assert stream(["one E", "N", "D two", "never"], ["END"]) == (["one ", "", ""], "", True)


def test_the_first_of_several_stops_counts():
    assert stream(["abcdef"], ["ef", "cd"]) == (["ab"], "", True)


def test_what_is_held_at_the_end_is_given_out():
    assert stream(["one EN"], ["END"]) == (["one "], "EN", False)


@pytest.mark.parametrize("pieces", [["aab"], ["a", "ab"], ["a", "a", "b"]])
def test_overlapping_beginnings(pieces):
    out, rest, stopped = stream(pieces, ["ab"])
    assert ("".join(out) + rest, stopped) == ("a", True)

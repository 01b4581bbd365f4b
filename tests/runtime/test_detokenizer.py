"""Text as it arrives: whole characters, and stop strings wherever tokens end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.runtime.detokenizer import Detokenizer
from ingot.runtime.tokenizer import Texts


class Pieces:
    """A tokenizer whose token i is the i-th of these byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.texts = Texts(self)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def feed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    """The text that each token decides, until a stop string is found, and what is left at the end."""
    detokenizer = Detokenizer(Pieces(pieces), stop)
    texts = []
    for i in range(len(pieces)):
        texts.append(detokenizer.feed(i))
        if detokenizer.stopped is not None:
            break
    return [*texts, detokenizer.finish()], detokenizer.stopped


TEXT = "né 日本語 😀👩‍👩‍👧 �x\U0010ffff."


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_come_whole_wherever_the_bytes_are_split(size):
    data = TEXT.encode()
    for shift in range(size):
        pieces = [data[:shift], *(data[i : i + size] for i in range(shift, len(data), size))]
        texts, _ = feed(pieces)
        assert "".join(texts) == TEXT
        at = 0
        for piece, text in zip(pieces, texts, strict=False):
            at += len(piece)
            arrived = data[:at].decode(errors="ignore")
            assert "".join(texts[: pieces.index(piece) + 1]) in TEXT
            assert text in arrived  # nothing before its bytes
        for i in range(len(pieces)):  # and nothing later than they are there
            whole = b"".join(pieces[: i + 1]).decode(errors="ignore")
            assert len("".join(texts[: i + 1])) == len(whole)


def test_bytes_that_are_no_character_are_replaced_not_kept_back():
    texts, _ = feed([b"a\xe6", b"\x97", b"b", b"\xff", b"\xf0\x9f"])
    assert texts == ["a", "", "�b", "�", "", "�"]


def reference(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abé", max_size=4), max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=4, unique=True),
    st.integers(1, 3),
)
def test_stop_strings_do_not_depend_on_the_tokens(words, stop, size):
    text = "".join(words)
    data = text.encode()
    expected = reference(text, tuple(stop))
    for pieces in ([w.encode() for w in words], [data[i : i + size] for i in range(0, len(data), size)], [data]):
        texts, stopped = feed(pieces, tuple(stop))
        assert ("".join(texts), stopped) == expected


def test_only_what_could_begin_a_stop_string_is_held():
    texts, stopped = feed([b"one<", b"e", b"nd", b"x<e", b"nd", b">tail"], ("<end>",))
    assert texts == ["one", "", "", "<endx", "", "", ""]
    assert stopped == "<end>"
    texts, stopped = feed([b"ab", b"c<e"], ("<end>",))
    assert texts == ["ab", "c", "<e"]
    assert stopped is None


def test_nothing_follows_a_stop_string():
    detokenizer = Detokenizer(Pieces([b"a.b", b"c"]), (".",))
    assert [detokenizer.feed(0), detokenizer.feed(1), detokenizer.finish()] == ["a", "", ""]

"""What a person sees of a sample: text as soon as it is whole, in the colours of the blocks it was taken from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptlab.cli import sample
from gptlab.cli.sample import PLAIN, blocks, colour, legend, text
from gptlab.data.tokenizers import get_tokenizer
from gptlab.interpret.generate import Step

BYTES = get_tokenizer("bytes")
SNOWMAN = "☃".encode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True)


def test_text_comes_as_soon_as_its_tokens_make_characters() -> None:
    made: list[int] = []

    def steps() -> Iterator[Step]:
        for token in (ord("a"), *SNOWMAN, SNOWMAN[0]):
            made.append(token)
            yield Step(token, 2)

    shown = text(list(b"hi"), steps(), BYTES, None)
    assert (next(shown), made) == ("hi", [])
    assert (next(shown), len(made)) == ("a", 1)
    assert [next(shown) for _ in range(3)] == ["", "", "☃"]
    assert (len(made), list(shown)) == (4, ["", "\N{REPLACEMENT CHARACTER}"])


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_each_piece_has_the_colour_of_its_block() -> None:
    steps = [Step(ord("a"), 1), Step(ord("\x1b"), 2), *(Step(byte, 3) for byte in SNOWMAN)]
    shown = list(text(list(b"hi"), iter(steps), BYTES, 3))
    assert shown[0] == f"\033[2mhi{PLAIN}"
    assert shown[1:3] == [f"{colour(1, 3)}a{PLAIN}", f"{colour(2, 3)}␛{PLAIN}"]
    assert "".join(shown[3:]) == f"{PLAIN}☃{PLAIN}"
    assert len({colour(1, 3), colour(2, 3), colour(3, 3)}) == 3
    assert "".join(text([], iter([Step(ord("a"), 1)]), BYTES, None)).removeprefix(f"\033[2m{PLAIN}") == "a"


@pytest.mark.usefixtures("terminal")
def test_the_last_line_has_the_colours_and_what_was_computed() -> None:
    assert legend(2, 0.625) == f"exit block {colour(1, 2)}1{PLAIN} {PLAIN}2{PLAIN}; 62.5% of the blocks computed"


def test_elsewhere_nothing_is_coloured() -> None:
    assert "\033" not in legend(2, 0.625) + "".join(text([104], iter([Step(97, 1)]), BYTES, 2))
    assert legend(2, None) == "nothing was written"


def test_a_line_a_token_holds_every_block_that_was_read() -> None:
    (line,) = blocks(iter([Step(ord("b"), 2, [ord("a"), 0x1B], [0.25, 0.5])]), BYTES)
    assert line.split() == ["'b'", "|", "'a'", "25%", "'\\x1b'", "50%"]

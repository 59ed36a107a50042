"""Stop strings: the text before the first one, whatever the pieces are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.inference.text import StopStrings

TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """(text before the stop string that is complete first, that string)."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(TEXT, max_size=5), stops=STOPS)
def test_pieces_give_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    scanner, shown = StopStrings(stops), []
    for piece in pieces:
        shown.append(scanner.push(piece))
        if scanner.found is None:  # nothing is held back that cannot begin a stop string
            held = "".join(pieces)[len("".join(shown)) :]
            seen = "".join(pieces[: len(shown)])[len("".join(shown)) :]
            assert held.startswith(seen)
            assert not seen or any(stop.startswith(seen) for stop in stops)
    shown.append(scanner.finish())
    assert ("".join(shown), scanner.found) == whole("".join(pieces), stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop: holds an empty string"):
        StopStrings(["a", ""])

"""The README's picture in Chromium: legible on light and dark, and everything within its frame."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import look
from test_report_browser import contrast

PICTURE = Path(__file__).parent.parent / "docs" / "way.svg"
#: For every text: its words, its colour, the colour of what lies under its middle, its overflow.
TEXTS = """
[...document.querySelectorAll('text')].map(t => {
  const own = t.getBoundingClientRect();
  const x = own.x + own.width / 2, y = own.y + own.height / 2;
  const under = [...document.querySelectorAll('rect')].filter(r => {
    const b = r.getBoundingClientRect();
    return b.left <= x && x <= b.right && b.top <= y && y <= b.bottom
      && getComputedStyle(r).fill !== 'none';
  }).pop();
  const within = under.getBoundingClientRect();
  return [t.textContent, getComputedStyle(t).fill, getComputedStyle(under).fill,
          Math.max(within.left - own.left, own.right - within.right)];
})
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_legible_and_fits_its_box(dark: bool) -> None:
    seen = look(PICTURE, [TEXTS], dark=dark)
    assert seen.requests == [], "the picture asks for something"
    assert len(seen.answers[0]) > 15, "the picture was not understood"
    for words, ink, ground, overflow in seen.answers[0]:
        ratio = contrast(ink, ground)
        assert ratio >= 4.5, f"{words!r}: {ink} on {ground} has a contrast of {ratio:.1f}"
        assert overflow <= 0, f"{words!r} is {overflow:.0f} pixels wider than its box"


def test_light_and_dark_differ() -> None:
    grounds = [look(PICTURE, [TEXTS], dark=dark).answers[0][0][2] for dark in (False, True)]
    assert grounds[0] != grounds[1], "the picture does not follow the reader's dark mode"

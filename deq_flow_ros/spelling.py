# SPDX-License-Identifier: Apache-2.0
"""Words that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is closest to one that is not, whatever its case.

    :returns: " (did you mean 'x'?)", or nothing where none is close.
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""

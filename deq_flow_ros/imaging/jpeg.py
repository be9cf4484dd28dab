# SPDX-License-Identifier: Apache-2.0
"""JPEG data that is not whole, which libjpeg decodes without a word."""

from __future__ import annotations

import re

_MORE = b"\xff\x00" * 10
"""So many bytes, of no meaning, libjpeg wants to have behind the last ones that it needs."""


def open_ended(data: bytes) -> bytes:
    """JPEG data whose decoder raises an error if some of it, more than a few bytes, is missing before its end mark.

    With the end mark there, libjpeg makes a grey area of what a camera lost on its USB, and reports nothing. Without
    it, libjpeg asks for more data. Data of several scans stays as it is, because its decoder needs the mark.
    """
    scan, end = data.find(b"\xff\xda"), data.rfind(b"\xff\xd9")
    if scan < 0 or end < scan or b"\xff\xc0" not in data or data.find(b"\xff\xda", scan + 2) > 0:
        return data
    for number, mark in enumerate(re.finditer(b"\xff([\xd0-\xd7])", data[scan:end])):
        if mark[1][0] & 7 != number & 7:  # restart marks count to 7 and start over: some are lost
            return data[: scan + mark.start()]
    return data[:end] + _MORE

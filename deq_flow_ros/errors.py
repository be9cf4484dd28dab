# SPDX-License-Identifier: Apache-2.0
"""What all errors have in common that are for the user to mend, not faults of the program."""

from __future__ import annotations


class UserError(Exception):
    """Something is wrong with what the user gave; the message says what, and what to do.

    Commands end with it in one line instead of a traceback.
    """

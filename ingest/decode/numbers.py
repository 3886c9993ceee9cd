"""Numbers that stand in text: what `int` and `float` may be asked to read. Pure.

Python's own reading takes more: `1_0`, `inf`, `nan`, digits of every script, blanks around them. It also raises at more
than 4,300 digits. Whoever reads a number out of text asks one of these patterns first, with `fullmatch`.
"""

from __future__ import annotations

import re

INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
"""A whole number; 64 bits have 20 digits at most, and the schema says which of them are too many."""
DECIMAL = re.compile(r"[+-]?\d{1,20}(?:\.\d{1,20})?", re.ASCII)
"""A number that is written out, as clocks and durations are."""
NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", re.ASCII)
"""Any number that a float may hold; the largest written out has 309 digits."""

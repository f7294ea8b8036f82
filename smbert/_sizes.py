"""Sizes as users write them: exact numbers, and shares such as 0.5, "2/3" or "35%"."""

from __future__ import annotations

import math
from fractions import Fraction

Size = int | float | str | Fraction


def parse(value: Size, name: str) -> int | Fraction:
    """An integer is a number of things, everything else a share in (0, 1], exactly as it is written.

    Raises:
        ValueError: negative, or a share out of range. TypeError: neither a number nor text.
    """
    remedy = 'To resolve, give a number such as 8, or a share such as 0.5, "2/3" or "35%".'
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise TypeError(f"`{name}` must be a number or a share, got {value!r}. {remedy}")
    text = (repr(value) if isinstance(value, float) else str(value)).replace(" ", "")
    try:
        if isinstance(value, int) or (isinstance(value, str) and text.lstrip("-").isdigit()):
            number = int(text)
        else:
            share = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
            number = None
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"`{name}` must be a number or a share, got {value!r}. {remedy}") from None
    if number is not None:
        if number < 0:
            raise ValueError(f"`{name}` must not be negative, got {value!r}. {remedy}")
        return number
    if not 0 < share <= 1:
        raise ValueError(f"`{name}` as a share must be above 0 and at most 1, got {value!r}. {remedy}")
    return share


def count_from(value: Size, size: int, name: str = "heads", multiple_of: int = 1) -> int:
    """How many of `size` units are asked for: an exact number as it is, a share rounded up to `multiple_of`.

    2/3 of 12 is 8 and of 3072 is 2048, whether it is written 2/3, "2/3", 0.667 or "66.7%": shares within 0.0005 of a
    fraction with a denominator of at most 16 mean that fraction, since rounding 8.004 up to 9 heads serves nobody.

    Raises:
        ValueError: above `size`, negative, or a share out of range. TypeError: neither a number nor text.
    """
    number = parse(value, name)
    if isinstance(number, Fraction):
        simple = number.limit_denominator(16)
        number = simple if simple and abs(simple - number) <= Fraction(1, 2000) else number
        return min(size, round_up(math.ceil(number * size), multiple_of))
    if number > size:
        raise ValueError(
            f"`{name}` must be at most {size}, of which there are no more, got {value!r}. To resolve, ask for {size} or "
            'less, or for a share such as "2/3".'
        )
    return number


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step

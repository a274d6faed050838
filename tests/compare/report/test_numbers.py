"""Numbers in words: digits, exponents, bytes, durations, p values."""

import pytest

from syncbn.compare.report.words.numbers import (
    MINUS,
    NOTHING,
    byte_words,
    number,
    p_cell,
    p_words,
    time_words,
)

PLAIN = str.maketrans({MINUS: "-", NOTHING: "-"})
"""Typographic signs as a keyboard has them."""


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.00"), (1.0, "1.00"), (400, "400"), (12345, "12345")]
)
def test_numbers_have_three_significant_digits_and_no_needless_exponent(value, text):
    assert number(value).translate(PLAIN) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 bytes"), (38_000, "38.0 kB"), (2.5e9, "2.50 GB")]
)
def test_bytes_have_the_largest_unit_that_fits(value, text):
    assert byte_words(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.714e-16, "7.71e-16"), (1e-8, "1e-8"), (0.0001, "1e-4"), (0.005, "0.00500")],
)
def test_small_numbers_have_a_short_exponent(value, text):
    assert number(value).translate(PLAIN) == text


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.4, "8 s"), (720, "12 min"), (11_100, "3 h 05 min")]
)
def test_durations_are_in_seconds_minutes_or_hours(seconds, words):
    assert time_words(seconds) == words


@pytest.mark.parametrize(
    ("p", "cell", "words"),
    [(0.004, "0.004", "= 0.004"), (0.0004, "< 0.001", "< 0.001"), (None, NOTHING, NOTHING)],
)
def test_p_values_have_three_digits_or_an_upper_bound(p, cell, words):
    assert (p_cell(p), p_words(p)) == (cell, words)

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos import InputError
from composer_effalgos.utils.checks import Range, check_number


@given(st.floats(-10, 10), st.sampled_from([0.0, 1.0]), st.sampled_from([2.0, 3.0]))
def test_bounds_belong_to_the_range_or_not(value, low, high):
    assert (value in Range(above=low, below=high)) == (low < value < high)
    assert (value in Range(least=low, most=high)) == (low <= value <= high)
    assert low not in Range(above=low)
    assert high not in Range(below=high)


@pytest.mark.parametrize('value', [2**63 - 1, np.int64(2**63 - 1), 2**63, 2.0**63])
def test_large_integers_are_not_rounded(value):
    assert (value in Range(below=2**63)) == (int(value) < 2**63)


@pytest.mark.parametrize('value', [1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers(value):
    check_number('share', value, least=0, most=1)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 10**400, True, None, '1', [1], 1j])
def test_what_is_no_finite_number(value):
    with pytest.raises(InputError, match=r'^share: expected a number that is finite, got'):
        check_number('share', value)


@pytest.mark.parametrize(
    ('bounds', 'words'),
    [
        ({'least': 0, 'below': 1}, r'in \[0, 1\)'),
        ({'above': 0, 'most': 1e6}, r'in \(0, 1e\+06\]'),
        ({'above': 1}, 'greater than 1'),
        ({'most': -3}, 'at most -3'),
    ],
)
def test_the_message_says_the_range(bounds, words):
    with pytest.raises(InputError, match=f"^share: expected a number {words}, got 'x'$"):
        check_number('share', 'x', **bounds)

"""Products of parameters, where not each test of them all says more than the others."""

from itertools import combinations, product

import pytest


def rows_with_all_pairs(*lists):
    """Few rows, a value of each list in each, in which every two values of two lists meet."""
    rows = list(product(*(range(len(each)) for each in lists)))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    lacking, chosen = set().union(*pairs.values()), []
    while lacking:
        best = max(rows, key=lambda row: len(pairs[row] & lacking))
        chosen.append(best)
        lacking -= pairs[best]
    return [tuple(each[i] for each, i in zip(lists, row, strict=True)) for row in sorted(chosen)]


def in_turns(rows, values):
    """Each row with one of the values. Of rows that come in twos, one of each two gets each value."""
    return [(*row, values[(i + i // 2) % len(values)]) for i, row in enumerate(rows)]


def in_pairs(parameters, fixtures=()):
    """Parametrizes a test by `rows_with_all_pairs` of lists of values, by name or by names with commas between.

    Names of `fixtures` are those that take their value as a parameter.
    """
    widths = [len(names.split(",")) for names in parameters]
    rows = rows_with_all_pairs(*map(list, parameters.values()))
    flat = [
        [value for width, each in zip(widths, row, strict=True) for value in (each if width > 1 else [each])]
        for row in rows
    ]
    return pytest.mark.parametrize(", ".join(parameters), flat, indirect=list(fixtures))

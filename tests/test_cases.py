"""Cases that stand for all of a test's."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from cases import stand_ins

BACKENDS, LAYOUTS, MASKS = ["reference", "torch", "triton"], ["nhd", "hnd"], range(10)
ALL = [
    {"backend": backend, "layout": layout, "mask": mask, "is_host": is_host}
    for backend, layout, mask, is_host in product(BACKENDS, LAYOUTS, MASKS, [False, True])
]


@pytest.mark.parametrize("is_left_out", [False, True])
def test_every_pair_of_values_is_in_a_case(is_left_out: bool) -> None:
    cases = [case for case in ALL if not (is_left_out and case["backend"] == "triton" and case["is_host"])]
    chosen = [cases[index] for index in sorted(stand_ins(cases))]
    for first, second in combinations(ALL[0], 2):
        assert {(case[first], case[second]) for case in chosen} == {(case[first], case[second]) for case in cases}
    assert len(MASKS) * len(BACKENDS) <= len(chosen) < len(cases) / 3


def test_every_value_is_in_a_case() -> None:
    chosen = [ALL[index] for index in sorted(stand_ins(ALL, 1))]
    for name in ALL[0]:
        assert {case[name] for case in chosen} == {case[name] for case in ALL}
    assert len(chosen) == len(MASKS)


def test_cases_of_one_parameter_all_stay() -> None:
    assert stand_ins([{"mask": mask} for mask in MASKS]) == set(MASKS)
    assert stand_ins([{}]) == {0}
    assert stand_ins([{"budget": 8, "sinks": 0}, {"budget": 8, "sinks": 1}]) == {0, 1}

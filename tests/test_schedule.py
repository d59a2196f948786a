import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlnlab.schedule import Schedule, expand

AT = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ([3, 1, 2], [3, 1, 2]),
        ((0.5, "full"), [0.5, "full"]),
        (range(2, 5), [2, 3, 4]),
        (np.array([0.5, 1.5]), [0.5, 1.5]),
        (0.1, [0.1]),
        ("full", ["full"]),
        ({"linear": [0, 1, 5]}, [0, 0.25, 0.5, 0.75, 1]),
        ({"linear": [2, 9, 1]}, [2]),
        ({"log10": [-1, 2, 4]}, [0.1, 1, 10, 100]),
        ({"log10": [2, 0, 3]}, [100, 10, 1]),
        ({"range": 4}, [0, 1, 2, 3]),
        ({"range": [4]}, [0, 1, 2, 3]),
        ({"range": [3, 6]}, [3, 4, 5]),
        ({"range": [-1, 2]}, [-1, 0, 1]),
    ],
)
def test_every_form_of_the_grammar_expands_to_its_values(spec, values):
    found = expand(spec, "key")
    assert found == (values if all(isinstance(value, str | int) for value in values) else pytest.approx(values))
    assert all(type(value) in (int, float, str) for value in found)


def test_integers_stay_integers():
    assert [type(value) for value in expand({"range": 2}, "key")] == [int, int]
    assert [type(value) for value in expand(np.array([1, 2]), "key")] == [int, int]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], r"^axis is empty: it needs at least one value"),
        ({"range": 0}, r"^axis is empty"),
        ({"range": [5, 5]}, r"^axis is empty"),
        ({"range": [1, 2, 3]}, r"^axis\.range = \[1, 2, 3\]: must be n or \[a, b\]"),
        ({"range": 2.5}, r"^axis\.range = 2\.5: must be a whole number"),
        ({"log": [0, 1, 2]}, r"^axis = .*: must be a list, a scalar or one of linear"),
        ({"linear": [0, 1, 2], "range": 3}, r"^axis = .*: must be a list"),
        ({}, r"^axis = \{\}: must be a list"),
        ({"linear": [0, 1]}, r"^axis\.linear = \[0, 1\]: must be \[lo, hi, n\]"),
        ({"log10": 3}, r"^axis\.log10 = 3: must be \[lo, hi, n\]"),
        ({"log10": [0, math.inf, 3]}, r"^axis\.log10 = inf: must be a finite number"),
        ({"linear": [math.nan, 1, 3]}, r"^axis\.linear = nan: must be a finite number"),
        ({"linear": [0, 1, 0]}, r"^axis\.linear\[2\] = 0: must be at least 1"),
        ({"linear": [0, 1, 2.5]}, r"^axis\.linear\[2\] = 2\.5: must be a whole number"),
        ({"log10": [0, 400, 3]}, r"^axis\.log10 = .*: lo and hi are exponents of ten"),
    ],
)
def test_a_mistake_in_the_grammar_is_named_with_its_key(spec, message):
    with pytest.raises(ValueError, match=message):
        expand(spec, "axis")


def scheduled(every, at, pairs, last=400):
    """All scheduled steps up to `last`, one by one."""
    steps = {step for step in range(last) if step % every == 0} if at is None else set(at)
    return sorted(steps | {step + 1 for step in steps}) if pairs else sorted(steps)


@st.composite
def schedules(draw):
    pairs = draw(st.booleans())
    if draw(st.booleans()):
        every = draw(st.integers(1, 12))
        return Schedule(every_n_steps=every, pairs=pairs), scheduled(every, None, pairs)
    at = draw(AT)
    return Schedule(at=at, pairs=pairs), scheduled(None, at, pairs)


@given(schedules(), st.integers(-1, 70))
def test_next_after_is_the_first_scheduled_step_later_than_a_step(schedule, step):
    schedule, steps = schedule
    assert schedule.next_after(step) == next((s for s in steps if s > step), None)


@given(schedules(), st.integers(-1, 70), st.integers(1, 15))
def test_nth_after_counts_the_scheduled_steps_later_than_a_step(schedule, step, n):
    schedule, steps = schedule
    later = [s for s in steps if s > step]
    assert schedule.nth_after(step, n) == (later[n - 1] if n <= len(later) else None)


@given(schedules(), st.integers(-1, 70), st.integers(0, 60))
def test_between_excludes_its_start_and_includes_its_stop(schedule, start, length):
    schedule, steps = schedule
    assert schedule.between(start, start + length) == [s for s in steps if start < s <= start + length]


@given(schedules(), st.integers(0, 70))
def test_a_step_is_in_a_schedule_exactly_if_it_is_scheduled(schedule, step):
    schedule, steps = schedule
    assert (step in schedule) == (step in steps)


def test_steps_given_as_powers_of_ten_are_rounded_and_repeats_dropped():
    assert Schedule(at={"log10": [0, 1, 11]}).steps == [1, 2, 3, 4, 5, 6, 8, 10]


def test_a_pair_is_a_step_and_the_one_behind_it():
    assert Schedule(at=[4, 10], pairs=True).steps == [4, 5, 10, 11]
    assert Schedule(every_n_steps=10, pairs=True).between(0, 21) == [1, 10, 11, 20, 21]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either every_n_steps or at, and not both"),
        ({"every_n_steps": 2, "at": [1]}, "needs either every_n_steps or at, and not both"),
        ({"every_n_steps": 0}, "every_n_steps = 0: must be at least 1"),
        ({"every_n_steps": 1.5}, "every_n_steps = 1.5: must be a whole number"),
        ({"at": [3, -1]}, "at = -1: must be a finite number and at least 0"),
        ({"at": [math.inf]}, "at = inf: must be a finite number"),
        ({"at": []}, "at is empty"),
    ],
)
def test_a_schedule_refuses_what_names_no_steps(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@given(schedules(), st.integers(1, 20), st.integers(0, 70))
def test_a_thinned_schedule_has_evenly_chosen_steps_of_its_own(schedule, most, last):
    schedule, _ = schedule
    every = [0, *schedule.between(0, last)]
    chosen = [0, *schedule.thinned(most, last).between(0, last)]
    assert set(chosen) <= set(every)
    assert len(chosen) - 1 <= most + 1  # a list that begins at step 0 is counted from there, a pair may be cut in two
    if len(every) - 1 <= most:
        assert chosen == every
    assert schedule.thinned(most, math.inf) is schedule


def test_a_thinned_schedule_sees_both_phases_of_an_oscillation():
    assert Schedule(every_n_steps=1).thinned(50, 100).between(0, 12) == [3, 6, 9, 12]
    assert Schedule(every_n_steps=10, pairs=True).thinned(10, 100).between(0, 100) == [1, 30, 31, 60, 61, 90, 91]
    assert Schedule(at=range(100)).thinned(40, 99).steps[:4] == [0, 3, 6, 9]


@given(st.integers(1, 9), st.integers(0, 40), st.one_of(st.integers(1, 9), AT))
def test_a_schedule_meets_a_period_where_the_steps_say_so(period, last, given):
    schedule = Schedule(given) if isinstance(given, int) else Schedule(at=given)
    wanted, found = set(range(period, last + 1, period)), set(schedule.between(0, last))
    assert schedule.meets(period, last) == bool(wanted & found)
    if wanted:
        assert schedule.meets(period, last, always=True) == (wanted <= found)

"""The planner finds the fastest candidate that really fits, and compiles few to know."""

import pytest

from revjax.errors import ConfigError
from revjax.memory import HARDWARE, Candidate, Choice, budget_bytes, by_the_clock, knee, largest, parse_bytes, search

MB = 1_000_000


def candidates(off=1.0):
    """Plans that take more time the less they keep, and how many bytes each really takes."""
    table = {"all": (1.0, 400), "attention": (1.2, 100), "nothing": (1.3, 60)}
    found, really = [], {}
    for plan, (time, bytes) in table.items():
        for n in (1, 2, 4):
            choice = Choice(plan, n, 1024)
            found.append(Candidate(choice, time * (1 + 0.02 * n), bytes * MB // n + 20 * MB))
            really[choice] = int(off * found[-1].predicted)
    return found, really


@pytest.mark.parametrize("off", [0.9, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("budget", [37, 46, 60, 75, 90, 130, 200, 300, 500, 700])
def test_the_fastest_that_really_fits_is_chosen_however_far_predictions_are_off(off, budget):
    options, really = candidates(off)
    tried = []

    def measure(choice):
        tried.append(choice)
        return really[choice]

    found = search(options, budget * MB, measure)
    fitting = [c for c in options if really[c.choice] <= budget * MB]
    if not fitting:
        assert found.chosen is None
        assert min(c.bytes for c in found.candidates if c.measured) == min(really.values())
    else:
        assert found.chosen.measured == really[found.chosen.choice] <= budget * MB
        assert found.chosen.time == min(c.time for c in fitting)
    assert len(tried) <= 5 and len(set(tried)) == len(tried)


@pytest.mark.parametrize("budget", [75, 130, 300, 700])
def test_by_the_clock_the_fastest_of_each_number_of_micro_batches_is_timed_and_one_that_fits_is_chosen(budget):
    options, really = candidates(off=1.1)
    took = {c.choice: c.time / c.choice.accumulation for c in options}  # more micro-batches are faster here
    found = search(options, budget * MB, really.__getitem__)
    timed = []

    def clock(choices):
        timed.extend(choices)
        return [took[choice] for choice in choices]

    clocked = by_the_clock(found, really.__getitem__, clock)
    assert timed[0] == found.chosen.choice and len({c.accumulation for c in timed}) == len(timed)
    for choice in timed:
        assert really[choice] <= budget * MB
        faster = [c for c in options if c.choice.accumulation == choice.accumulation and took[c.choice] < took[choice]]
        assert all(really[c.choice] > budget * MB for c in faster)
    assert took[clocked.chosen.choice] == clocked.chosen.seconds == min(map(took.get, timed))
    assert {c.choice for c in clocked.candidates if c.seconds is not None} == set(timed)
    assert len(clocked.candidates) == len(options) and clocked.budget == found.budget


def test_what_is_predicted_to_be_much_slower_is_not_timed():
    options, really = candidates()
    slow = Candidate(Choice("all", 8, 1024), time=2.0, predicted=50 * MB)
    found = search([*options, slow], 700 * MB, lambda choice: really.get(choice, 50 * MB))
    measured = []
    clocked = by_the_clock(found, lambda c: measured.append(c) or really[c], lambda choices: [1.0] * len(choices))
    assert {c.choice.accumulation for c in clocked.candidates if c.seconds} == {1, 2, 4}
    assert all(c.accumulation in (2, 4) for c in measured)  # what is known to be slow is not compiled either


def test_a_candidate_that_another_one_beats_is_not_on_the_frontier():
    options, really = candidates()
    worse = Candidate(Choice("all", 8, 1024), time=2.0, predicted=500 * MB)
    found = search([*options, worse], 1000 * MB, lambda choice: really.get(choice, 500 * MB))
    frontier = found.frontier()
    assert worse not in frontier
    assert [c.time for c in frontier] == sorted(c.time for c in frontier)
    assert [c.bytes for c in frontier] == sorted((c.bytes for c in frontier), reverse=True)


def test_the_knee_is_where_saving_memory_begins_to_cost_time():
    points = [(1.00, 1000), (1.02, 300), (1.04, 200), (1.60, 150)]
    frontier = [Candidate(Choice("all", n, 1), time, bytes) for n, (time, bytes) in enumerate(points)]
    assert knee(frontier).predicted == 200
    assert knee(frontier[:1]) is frontier[0]


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("start, unit", [(1, 1), (48, 1), (100_000, 1), (512, 128)])
@pytest.mark.parametrize("most", [1, 2, 31, 32, 33, 1000, 54_321])
def test_the_largest_size_that_fits_is_found_to_a_part_in_32_with_few_programs(power, start, unit, most):
    tried = []

    def bytes_of(size):
        tried.append(size)
        return 100 * MB + int(MB * (size / unit) ** power)

    budget = 100 * MB + int(MB * most**power)
    size, needed = largest(bytes_of, budget, start=start, unit=unit)
    assert size % unit == 0 and needed == bytes_of(size) <= budget
    assert size <= most * unit < size * (1 + 1 / 32) + unit
    assert len(set(tried)) <= 14


def test_no_size_fits_where_the_smallest_does_not():
    assert largest(lambda size: 100 * MB + size, 100 * MB, start=4096, unit=128) is None


@pytest.mark.parametrize(
    "text, bytes",
    [("40GiB", 40 * 2**30), ("8 GB", 8 * 10**9), ("500mb", 500 * 10**6), ("1.5kib", 1536), ("1e9", 10**9), ("7", 7)],
)
def test_bytes_are_read_with_their_units(text, bytes):
    assert parse_bytes(text) == bytes


@pytest.mark.parametrize("text", ["40 gigs", "", "GB", "-1GB", "0", "1e999", "nan", "4..0GB", "1GBB"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="40GiB|above 0"):
        parse_bytes(text)


def test_a_budget_may_be_a_part_of_a_device_that_is_not_here():
    assert budget_bytes("auto", "h200") == int(0.9 * HARDWARE["h200"].bytes)
    assert budget_bytes("0.5", "H100") == HARDWARE["h100"].bytes // 2
    assert budget_bytes("8GB", "h100") == 8 * 10**9
    with pytest.raises(ConfigError, match="no hardware 'h20'. Did you mean 'h200'"):
        budget_bytes("auto", "h20")

"""Every case of `benchmarks/cases.py`, one implementation after the other. `-k "step and guided"` selects."""


def test_throughput(case, implementation, record):
    row = record(case, implementation)
    assert row.seconds > 0

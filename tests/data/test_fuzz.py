"""Whatever bytes are read, they are read or are one clear error; scripts/fuzz.py tries thousands."""

import datasets

from scripts.fuzz import KINDS, fuzz


def test_damaged_inputs_are_read_or_refused() -> None:
    """Guards against errors of libraries that name neither the file nor what to do."""
    datasets.disable_progress_bars()
    counts, _ = fuzz(inputs=200, seed=1)
    few = {"parquet", "cached rows"}  # slow ones, and what is made anew
    for kind in KINDS.keys() - few:
        assert counts[kind, "refused"] >= 2, kind
    assert counts["cached rows", "read"] >= 5
    assert sum(count for (_, end), count in counts.items() if end == "read") >= 5

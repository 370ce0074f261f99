"""Whatever bytes are read, they are read or are one clear error; scripts/fuzz.py tries thousands."""

import datasets

from scripts.fuzz import KINDS, fuzz


def test_damaged_inputs_are_read_or_refused() -> None:
    """Guards against errors of libraries that name neither the file nor what to do."""
    datasets.disable_progress_bars()
    counts = fuzz(inputs=250, seed=1)
    for kind, (_, _, share) in KINDS.items():
        assert counts[kind, "refused"] >= 5 or share < 5
    assert sum(count for (_, end), count in counts.items() if end == "read") >= 5

"""Peak memory of one kind of step, measured in a process of its own: python -m scripts.benchmarking.memory JSON.

Of a process that imports what a run imports and does nothing it is some 500 MiB on a CPU ("imports" in the results),
so that at small sizes the ratio of two peaks says little: compare their differences to it.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from .sizes import Size
from .steps import STEPS, make_steps
from .timing import peak_memory

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS_TAKEN = 3
IMPORTS = "imports"


def peak_memories(size: Size, precision: str) -> dict[str, float]:
    """MiB at the peak of a process that takes some steps of each kind: resident on a CPU, of the allocator on a GPU.

    Beside the steps' names "imports": of a process that takes none.

    Raises:
        RuntimeError: a process failed; the message holds what it wrote.
    """
    found = {}
    for name in (IMPORTS, *STEPS, "step_custom_forms"):
        request = json.dumps({"size": asdict(size), "precision": precision, "step": name})
        command = [sys.executable, "-m", "scripts.benchmarking.memory", request]
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"measuring the memory of {name!r} failed:\n{process.stderr[-2000:]}")
        found[name] = float(process.stdout.split()[-1])
    return found


def main(request: dict) -> None:
    """Take the steps that were asked for and print the peak."""
    if request["step"] != IMPORTS:
        step = make_steps(Size(**request["size"]), request["precision"], (request["step"],))[request["step"]]
        for _ in range(STEPS_TAKEN):
            step()
    print(peak_memory())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

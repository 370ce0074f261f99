"""How long a run has trained, over all its interruptions."""

import time
from pathlib import Path

from transformers import TrainerCallback

from d3etr_hf.errors import DamagedFileError
from d3etr_hf.files import write_json
from d3etr_hf.runs.output_folder import REMEDIES, SECONDS, read_record


class Stopwatch(TrainerCallback):
    """Seconds spent on training steps and waiting for their data; evaluation and saving do not count.

    Kept in the output folder at every save, so that an interrupted run knows what it spent.
    """

    def __init__(self, output: Path):
        self.file = output / SECONDS
        self.seconds = 0.0
        if self.file.exists():
            self.seconds = read_record(self.file).get("seconds")
            if not isinstance(self.seconds, (int, float)):
                raise DamagedFileError(f"{self.file} is damaged, since it holds no seconds: {REMEDIES[SECONDS]}")
        self.mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.file, {"seconds": self.seconds, "steps": state.global_step})
        self.mark = time.perf_counter()

"""How long a run has trained, over all its interruptions."""

import time
from pathlib import Path

from transformers import TrainerCallback

from d3etr_hf.errors import DamagedFileError
from d3etr_hf.files import write_json
from d3etr_hf.runs.output_folder import REMEDIES, SECONDS, read_record

SECONDS_OF_CLOCK, PROCESSOR_SECONDS = "seconds", "processor_seconds"


class Stopwatch(TrainerCallback):
    """Time spent on training steps and waiting for their data; evaluation and saving do not count.

    Kept in the output folder at every save, so that an interrupted run knows what it spent.

    Attributes:
        spent: by name, `seconds`, and of a training on the CPU `processor_seconds`, which this process has computed:
            what else the machine did meanwhile does not count.
    """

    def __init__(self, output: Path, on_cpu: bool = False):
        self.file = output / SECONDS
        self.clocks = {SECONDS_OF_CLOCK: time.perf_counter}
        if on_cpu:
            self.clocks[PROCESSOR_SECONDS] = time.process_time
        self.spent = dict.fromkeys(self.clocks, 0.0)
        if self.file.exists():
            before = read_record(self.file)
            self.spent = {name: before[name] for name in self.clocks if name in before}
            numbers = all(isinstance(value, (int, float)) for value in self.spent.values())
            if SECONDS_OF_CLOCK not in before or not numbers:
                raise DamagedFileError(f"{self.file} is damaged, since it holds no seconds: {REMEDIES[SECONDS]}")
        self._set_marks()

    def _set_marks(self) -> None:
        self.marks = {name: self.clocks[name]() for name in self.spent}

    def on_train_begin(self, args, state, control, **kwargs):
        self._set_marks()

    def on_step_end(self, args, state, control, **kwargs):
        before = self.marks
        self._set_marks()
        self.spent = {name: value + self.marks[name] - before[name] for name, value in self.spent.items()}

    def on_evaluate(self, args, state, control, **kwargs):
        self._set_marks()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.file, self.spent | {"steps": state.global_step})
        self._set_marks()

"""The picture of a training that is under way, drawn again after its evaluations."""

import time
from pathlib import Path

from transformers import TrainerCallback

from d3etr_hf.files import write_errors, write_json
from d3etr_hf.visualization.training_curves import draw_training_curves

# drawing takes at most one part in so many of the time
LEAST_SECONDS_BY_DRAWING = 20


class CurvesWhileRunning(TrainerCallback):
    """Writes a run's log history and draws its curves, on the main process, at each evaluation.

    While training, not before twenty times as long has gone by as drawing took the last time.

    Args:
        output: the run's folder.
        history, picture: names of the two files there.
    """

    def __init__(self, output: Path, history: str, picture: str = "curves.png"):
        self.output, self.history, self.picture = output, output / history, output / picture
        self.drawn, self.took, self.trains = time.perf_counter(), 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trains = True

    def on_train_end(self, args, state, control, **kwargs):
        self.trains = False

    def on_evaluate(self, args, state, control, **kwargs):
        began = time.perf_counter()
        is_soon = began - self.drawn < LEAST_SECONDS_BY_DRAWING * self.took
        if not state.is_world_process_zero or (self.trains and is_soon):
            return
        write_json(self.history, state.log_history)
        with write_errors(self.picture):
            draw_training_curves({self.output.resolve().name: state.log_history}, self.picture)
        self.drawn = time.perf_counter()
        self.took = self.drawn - began

"""The picture of a training that is under way, drawn again after its evaluations."""

import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from d3etr_hf.errors import WriteError
from d3etr_hf.files import UNFINISHED, write_errors, write_json
from d3etr_hf.visualization.training_curves import draw_training_curves, has_curves

# drawing takes at most one part in so many of the time
LEAST_SECONDS_BY_DRAWING = 20

logger = logging.get_logger(__name__)


class CurvesWhileRunning(TrainerCallback):
    """Writes a run's log history at each evaluation, and draws its curves, on the main process.

    While training they are not drawn before twenty times as long has gone by as drawing took the last time. What
    cannot be written is warned of once and ends no training.

    Args:
        output: the run's folder.
        history, picture: names of the two files there.
    """

    def __init__(self, output: Path, history: str, picture: str = "curves.png"):
        self.output, self.history, self.picture = output, output / history, output / picture
        self.drawn, self.took, self.trains, self.warned = time.perf_counter(), 0.0, False, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trains = True

    def on_train_end(self, args, state, control, **kwargs):
        self.trains = False

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            write_json(self.history, state.log_history)
            self._draw({self.output.resolve().name: state.log_history})
        except WriteError as error:
            if not self.warned:
                logger.warning(f"the training goes on without its newest curves: {error}")
            self.warned = True

    def _draw(self, histories: dict[str, list[dict]]) -> None:
        began = time.perf_counter()
        is_soon = began - self.drawn < LEAST_SECONDS_BY_DRAWING * self.took
        if (self.trains and is_soon) or not has_curves(histories):
            return
        unfinished = self.picture.with_name(f"{self.picture.name}{UNFINISHED}")
        with write_errors(self.picture):
            try:
                draw_training_curves(histories, unfinished)
                unfinished.replace(self.picture)
            finally:
                unfinished.unlink(missing_ok=True)
        self.drawn = time.perf_counter()
        self.took = self.drawn - began

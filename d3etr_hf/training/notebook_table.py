"""The table that a training shows in a notebook: step, losses and average precision. Needs IPython."""

from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

STEP, LOSS = "Step", "Loss"
# by metric, as COCO calls them
SCORES = {"eval_AP": "AP", "eval_AP50": "AP50"}


def show_table(trainer: Trainer) -> None:
    """Let a trainer show this table where it would show Transformers' own."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NotebookTable())


class NotebookTable(NotebookProgressCallback):
    """Transformers' table without its column for each metric (there is one a class) and for a validation loss.

    Of the losses it shows the total and the sum of each query group's terms.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = NotebookTrainingTracker(state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Losses make a row of their own where nothing is evaluated."""
        if args.eval_strategy == IntervalStrategy.NO and "loss" in (logs or {}):
            self._add_row({STEP: state.global_step, **losses_of(logs)})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Average precision beside the last losses."""
        logged = next((log for log in reversed(state.log_history) if "loss" in log), {})
        metrics = metrics or {}
        scores = {title: metrics[name] for name, title in SCORES.items() if name in metrics}
        self._add_row({STEP: state.global_step, **losses_of(logged), **scores})
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
        elif self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def _add_row(self, values: dict[str, Any]) -> None:
        if self.training_tracker is not None:
            self.training_tracker.write_line(values)


def losses_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The total loss and each group's share in it, by their columns' titles."""
    if "loss" not in logs:
        return {}
    sums: dict[str, float] = {LOSS: logs["loss"]}
    for name, value in logs.items():
        words = name.split("/")
        if words[0] == "loss" and len(words) == 3:  # not of single layers
            title = f"{words[1].capitalize()} group"
            sums[title] = sums.get(title, 0.0) + value
    return sums

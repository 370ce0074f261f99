"""A training that ends when it gets no better."""

from collections.abc import Mapping, Sequence

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback, whose count goes on with a run: it is counted again in the run's log history.

    Args:
        early_stopping_patience: evaluations one after another that are no better than the best before.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience_counter = evaluations_since_best(state.log_history, args)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True  # it was stopped, and then interrupted
            logger.warning(
                f"no step is taken: this training stopped early, after step {state.global_step}, since in "
                f"{self.early_stopping_patience_counter} evaluations {args.metric_for_best_model} was no better"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        stops = control.should_training_stop
        super().on_evaluate(args, state, control, **kwargs)
        if control.should_training_stop and not stops:
            kept = "" if args.load_best_model_at_end else "; --load_best_model_at_end true would keep the best weights"
            logger.warning(
                f"stopped after step {state.global_step}: in {self.early_stopping_patience_counter} evaluations "
                f"{args.metric_for_best_model} was no better than {state.best_metric:.4f}{kept}"
            )


def evaluations_since_best(log_history: Sequence[Mapping], args: TrainingArguments) -> int:
    """How many evaluations at the end of a run's log history are no better than the best before; each step's last."""
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    values = {entry["step"]: entry[name] for entry in log_history if name in entry}
    return since_best(list(values.values()), args.greater_is_better)


def since_best(values: Sequence[float], greater_is_better: bool) -> int:
    """How many values at the end of a sequence are no better than the best before them."""
    if not values:
        return 0
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - values.index(best)

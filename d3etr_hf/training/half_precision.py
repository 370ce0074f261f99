"""float16: steps that the gradient scaler passes over, counted, and a run of nothing else stopped."""

from collections.abc import Callable

from accelerate import Accelerator
from transformers import TrainerCallback

from d3etr_hf.errors import NonFiniteLossError

# A scaler halves its scale at each such step: from 65536 it has come to nothing long before.
MOST_SKIPPED_IN_A_ROW = 50


class SkippedSteps(TrainerCallback):
    """Counts the optimizer steps that were skipped because a gradient overflowed; does nothing without a scaler.

    A skipped step is known by the scale, which falls: Accelerate's own flag does not see those that a fused optimizer
    skips by itself.

    Args:
        accelerator: of the trainer.
        undo: takes back what a step that is skipped has done beside the weights.

    Attributes:
        count: skipped steps since the last reading.
        in_a_row: skipped steps since the last one that was taken.
    """

    def __init__(self, accelerator: Accelerator, undo: Callable[[], None]):
        self.accelerator, self.undo = accelerator, undo
        self.count = self.in_a_row = 0
        self._scale = float("inf")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Keeps the scale."""
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Raises: NonFiniteLossError where too many steps in a row were skipped."""
        if self.accelerator.scaler is None:
            return
        if self.accelerator.scaler.get_scale() >= self._scale:
            self.in_a_row = 0
            return
        self.undo()
        self.count += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(
                f"step {state.global_step + 1}: {self.in_a_row} steps in a row were skipped, since their gradients "
                "overflow in float16 at any loss scale: the run has diverged, or the model needs bf16 or float32; "
                "lower the learning rate, or use another precision"
            )

    def read(self) -> int:
        """The count, which starts afresh."""
        count, self.count = self.count, 0
        return count

"""What the two-process tests run: `python distributed_worker.py OUTPUT SHAPES RUN BATCH_SIZE CHECKPOINTS NORMALISER`.

Evaluates each checkpoint of a folder, then takes one training step from it; the main process writes metrics, gradients
and log of each.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3etr_hf.models.loading import load_detector  # noqa: E402
from tests.shapes_fixture import shapes_trainer  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402


class KeepGradients(TrainerCallback):
    """Copies the gradients before the first optimizer step."""

    gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {
                name.removeprefix("module."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }


def run_checkpoint(checkpoint: Path, shapes: Path, run: Path, batch_size: int, normaliser: str) -> dict:
    """Metrics, and the first step's gradients and log, of a checkpoint of any family."""
    keeper = KeepGradients()
    student = load_detector(str(checkpoint), "student")
    trainer = shapes_trainer(
        shapes,
        run,
        student=student,
        teacher=tiny_model(1, student.config.model_type),
        callbacks=[keeper],
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        prediction_normaliser=normaliser,
    )
    metrics = trainer.evaluate()
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    world = trainer.accelerator.num_processes
    return {"metrics": metrics, "gradients": keeper.gradients, "log": log, "world": world}


def main() -> None:
    output, shapes, run, batch_size, checkpoints, normaliser = sys.argv[1:]
    torch.set_num_threads(1)
    results = {
        checkpoint.name: run_checkpoint(
            checkpoint, Path(shapes), Path(run) / checkpoint.name, int(batch_size), normaliser
        )
        for checkpoint in sorted(Path(checkpoints).iterdir())
    }
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main()

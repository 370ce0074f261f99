"""What the two-process tests run: `python distributed_worker.py OUTPUT.pt SHAPES RUN BATCH_SIZE CHECKPOINT`.

Evaluates a checkpoint, then takes one training step from it; the main process writes metrics, gradients and log.
"""

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


def main() -> None:
    output, shapes, run, batch_size, checkpoint, *normaliser = sys.argv[1:]
    torch.set_num_threads(1)
    keeper = KeepGradients()
    student = load_detector(checkpoint, "student")
    trainer = shapes_trainer(
        Path(shapes),
        run,
        student=student,
        teacher=tiny_model(1, student.config.model_type),
        callbacks=[keeper],
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=int(batch_size),
        per_device_eval_batch_size=3,
        prediction_normaliser=normaliser[0],
    )
    metrics = trainer.evaluate()
    trainer.train()
    if trainer.is_world_process_zero():
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        world = trainer.accelerator.num_processes
        torch.save({"metrics": metrics, "gradients": keeper.gradients, "log": log, "world": world}, output)


if __name__ == "__main__":
    main()

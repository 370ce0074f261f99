"""More steps for a run that is there: whether its steps so far are those of the longer run."""

from pathlib import Path

import pytest

from d3etr_hf.errors import OutputFolderError
from d3etr_hf.runs.longer_run import is_longer, refuse_planned_length


@pytest.mark.parametrize(
    ("old", "new", "longer"),
    [
        ({"max_steps": 4}, {"max_steps": 8}, True),
        ({"max_steps": 8}, {"max_steps": 4}, False),
        ({}, {"num_train_epochs": 12.0}, True),
        ({"num_train_epochs": 2}, {}, True),  # the default is three
        ({"num_train_epochs": 2}, {"num_train_epochs": 1}, False),
        ({"max_steps": 4}, {"num_train_epochs": 12}, False),  # which is longer, nobody knows yet
        ({"max_steps": 4}, {"max_steps": 8, "seed": 3}, False),
        ({"max_steps": 4}, {"max_steps": 4}, False),
    ],
)
def test_is_longer(old, new, longer):
    changed = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    assert is_longer(old, new, changed) is longer


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, r"its learning rate was planned for it.* \(a run with --lr_scheduler_type constant would go on"),
        ({"lr_scheduler_type": "constant", "learning_rate_drop": 0.8}, "its learning rate was planned"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, "warmup_steps follows it"),
        ({"lr_scheduler_type": "constant", "save_steps": 0.5}, "save_steps follows it"),
        ({"lr_scheduler_type": "constant", "strong_end_fraction": 0.9}, "strong_end_fraction follows it"),
        ({"lr_scheduler_type": "constant", "mosaic": 0.5}, "mosaic follows it"),
        ({"lr_scheduler_type": "constant", "distillation_end": 0.8}, "distillation_end follows it"),
        ({"lr_scheduler_type": "constant", "distillation_decay": True}, "distillation_decay follows it"),
        ({"lr_scheduler_type": "constant", "distillation_end": 1.0, "augmentation": "paper"}, None),
        ({"lr_scheduler_type": "constant"}, None),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "save_steps": 2}, None),
    ],
)
def test_what_follows_from_the_length_cannot_go_on(options, cause):
    arguments = Path("runs/a"), options | {"max_steps": 4}, options | {"max_steps": 8}, ["max_steps"]
    if cause is None:
        refuse_planned_length(*arguments)
        return
    start = r"runs.a holds this run with max_steps 4, and cannot go on to max_steps 8: "
    with pytest.raises(OutputFolderError, match=f"{start}{cause}") as caught:
        refuse_planned_length(*arguments)
    assert "--model runs/a --output_dir NEW_FOLDER" in str(caught.value)

"""Take a training step again whose loss or gradient was not finite, and say where it begins.

    d3etr reproduce runs/student/not_finite/step_120_rank_0.safetensors

A training that stops for such a step, or skips it (--skip_nonfinite_steps), leaves this file: the student before the
step, the batch, the state of random numbers and the options.
"""

from dataclasses import dataclass, field

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.configurations import option
from d3etr_hf.training.reproduction import Reproduction, reproduce_step

MOST_NAMED = 5


@dataclass
class ReproduceArguments:
    """Which step."""

    step: str = field(metadata={"help": "The file that the training left; also taken as first argument."})
    use_cpu: bool = option(False, "Leave the accelerator alone.")


def main() -> None:
    """What `d3etr reproduce` runs."""
    (arguments,) = parse_arguments([ReproduceArguments], description=__doc__, first_argument="step")
    print(report(reproduce_step(arguments.step, arguments.use_cpu)))


def report(found: Reproduction) -> str:
    """What came of it, in words and a table of the loss terms by decoder layer."""
    kept = found.kept
    lines = [
        f"step {kept.step}, rank {kept.rank} of {kept.processes}, image ids "
        f"{[label['image_id'] for label in kept.labels]}, {kept.mixed_precision} mixed precision on {kept.device}",
        f"then: {kept.what}",
        f"the student's weights that hold NaN or infinity before it: {_named(found.weights)}",
        f"modules that made it of finite inputs: {_named(found.modules)}",
    ]
    if found.refused:
        return "\n".join([*lines, f"now: {found.refused}"])
    width = max(map(len, found.terms), default=0)
    lines += [f"  {name:<{width}}  {'  '.join(f'{v:>9.4g}' for v in values)}" for name, values in found.terms.items()]
    return "\n".join([*lines, f"parameters whose gradient is not finite: {_named(found.gradients)}"])


def _named(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"

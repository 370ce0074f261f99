"""Write a trained detector's model card, and upload it to the Hub.

    python scripts/publish.py runs/demo/distilled                                       # the card alone
    python scripts/publish.py runs/demo/distilled --repo_id user/student --dry_run      # and what would be uploaded
    python scripts/publish.py runs/demo/distilled --repo_id user/student --license apache-2.0 \\
        --compare "student alone=runs/demo/student_alone"

All figures are measured from the run's folder, its data and its teacher, once; they lie in metrics.json. Only the
weights, their configurations, the card with its pictures and figures, and the YAML of the run are uploaded. Called
again after a failure it sends what is missing.
"""

import sys
from pathlib import Path

# scripts/evaluate.py would hide the evaluate package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from d3etr_hf.cli.command_line import parse_arguments, run
from d3etr_hf.cli.training_run import USER_ERRORS
from d3etr_hf.data import DataArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.publish import PublishArguments, publish


def main() -> None:
    types = (PublishArguments, CardArguments, DataArguments)
    arguments, card, data = parse_arguments(types, description=__doc__, first_argument="folder")
    print(publish(arguments, card, None if data == DataArguments() else data))


if __name__ == "__main__":
    run(main, USER_ERRORS)

"""Write a trained detector's model card, and upload it to the Hub.

    d3etr publish runs/demo/distilled                                       # the card alone
    d3etr publish runs/demo/distilled --repo_id user/student --dry_run      # and what would be uploaded
    d3etr publish runs/demo/distilled --repo_id user/student --license apache-2.0 \\
        --compare "student alone=runs/demo/student_alone"

All figures are measured from the run's folder, its data and its teacher, once; they lie in metrics.json. Only the
weights, their configurations, the card with its pictures and figures, and the YAML of the run are uploaded. Called
again after a failure it sends what is missing.
"""

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.publish import PublishArguments, publish


def main() -> None:
    """What `d3etr publish` runs."""
    types = (PublishArguments, CardArguments, DataArguments)
    arguments, card, data = parse_arguments(types, description=__doc__, first_argument="folder")
    print(publish(arguments, card, None if data == DataArguments() else data))

"""Write a trained detector's model card, and upload it to the Hub.

    d3etr publish runs/demo/distilled                                       # the card alone
    d3etr publish runs/demo/distilled --repo_id user/student --dry_run      # and what would be uploaded
    d3etr publish runs/demo/distilled --repo_id user/student --license apache-2.0 \\
        --compare "student alone=runs/demo/student_alone"

All figures are measured from the run's folder, its data and its teacher, once; they lie in metrics.json. Only the
weights, their configurations, the card with its pictures and figures, and the YAML of the run are uploaded. Called
again after a failure it sends what is missing. A model without a licence is not uploaded: somebody at a terminal is
asked for one. A dry run writes nothing.
"""

from dataclasses import replace
from pathlib import Path

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import CommandLineError
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.licenses import ask_for_license, license_in
from d3etr_hf.publishing.publish import PublishArguments, licenses_of_sources, publish


def main() -> None:
    """What `d3etr publish` runs."""
    types = (PublishArguments, CardArguments, DataArguments)
    arguments, card, data = parse_arguments(types, description=__doc__, first_argument="folder")
    print(publish(arguments, with_license(arguments, card), None if data == DataArguments() else data))


def with_license(arguments: PublishArguments, card: CardArguments) -> CardArguments:
    """The card's arguments, with the licence that a person at the terminal is asked for before an upload without one.

    Raises:
        CommandLineError: the answer is no licence of the Hub's.
    """
    folder = Path(arguments.folder)
    asked = arguments.repo_id is not None and not arguments.dry_run and folder.is_dir()
    if not asked or card.license is not None or license_in(folder) is not None:
        return card
    try:
        return replace(card, license=ask_for_license(folder, licenses_of_sources(folder)))
    except ValueError as error:
        raise CommandLineError(str(error)) from None

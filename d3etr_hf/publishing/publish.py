"""From a finished run to a published model: measure, draw, write the card, upload."""

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments
from d3etr_hf.publishing.card import CardArguments, write_card
from d3etr_hf.publishing.measurements import is_measured, measure_run, select_rows
from d3etr_hf.publishing.run_folder import PublishedRun, load_run
from d3etr_hf.publishing.upload import describe_upload, upload
from d3etr_hf.runs.output_folder import HISTORY


@dataclass
class PublishArguments:
    """Which run to publish, and where."""

    folder: str = field(metadata={"help": "The output folder of a finished run; also taken as the first argument."})
    repo_id: str | None = option(None, "Where on the Hub: owner/name. Without it only the card is written.")
    private: bool = option(False, "Make the repository private, if it is new; else it is as the account's default.")
    revision: str | None = option(None, "An existing branch of the repository; by default main.")
    dry_run: bool = option(False, "Write the card and print what would be uploaded; upload nothing.")
    teacher: str | None = option(None, "Where the teacher is now, if it has moved; 'none' leaves it out of the card.")
    measure_again: bool = option(False, "Measure and draw anew what lies in the folder already.")


def publish(arguments: PublishArguments, card: CardArguments, data: DataArguments | None = None) -> str:
    """Write the card of a run and upload the folder.

    Args:
        data: where the data are now; by default where the run had them.

    Returns:
        What to tell: the address of the commit, or what would be uploaded.

    Raises:
        PublishError, HubError, PrivacyError: see there; nothing local is lost.
    """
    from d3etr_hf.visualization.run_pictures import is_drawn

    folder = Path(arguments.folder)
    # another teacher, or other data, are other figures
    again = arguments.measure_again or arguments.teacher is not None or data is not None
    if again or not (is_measured(folder, card.compared()) and is_drawn(folder)):
        prepare(load_run(folder, data, arguments.teacher), card, arguments.repo_id, again)
    else:
        # all that a card needs lies in the folder: models and data may be gone by now
        write_card(folder, select_rows(folder, card.compared()), card, arguments.repo_id)
    if arguments.dry_run or arguments.repo_id is None:
        return describe_upload(folder, arguments.repo_id)
    private, revision = arguments.private or None, arguments.revision
    command = resume_command(folder, arguments.repo_id, card, private, revision)
    return upload(folder, arguments.repo_id, command, private=private, revision=revision)


def prepare(run: PublishedRun, card: CardArguments, repo_id: str | None = None, again: bool = False) -> Path:
    """Everything that lies beside the weights of a published model: metrics, pictures, the card (returned)."""
    # here, since the trainer imports this file and must not need matplotlib
    from d3etr_hf.visualization.run_pictures import draw_pictures

    metrics = measure_run(run, card.compared(), again)
    draw_pictures(run.folder, run.record(HISTORY), run.val, run.models)
    return write_card(run.folder, metrics, card, repo_id)


def resume_command(
    folder: Path, repo_id: str, card: CardArguments, private: bool | None = None, revision: str | None = None
) -> str:
    """The command that publishes this folder, which is measured already, with every argument that matters."""
    words = ["python", "scripts/publish.py", str(folder), "--repo_id", repo_id]
    if private:
        words.append("--private")
    if revision is not None:
        words += ["--revision", revision]
    for name, value in asdict(card).items():
        if value:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join(words)

"""From a finished run to a published model: measure, draw, write the card, upload."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from d3etr_hf.configurations import option
from d3etr_hf.data import DataArguments
from d3etr_hf.errors import PublishError, UserError
from d3etr_hf.models.places import refuse_other_place
from d3etr_hf.publishing.card import CardArguments, write_card
from d3etr_hf.publishing.licenses import license_in, licenses_of, require_license, without_license
from d3etr_hf.publishing.measurements import is_measured, measure_run, read_metrics, select_rows
from d3etr_hf.publishing.run_folder import NO_TEACHER, PublishedRun, load_run, read_configuration
from d3etr_hf.publishing.upload import describe_upload, upload
from d3etr_hf.runs.output_folder import HISTORY

logger = logging.get_logger(__name__)


@dataclass
class PublishArguments:
    """Which run to publish, and where."""

    folder: str = field(metadata={"help": "The output folder of a finished run; also taken as the first argument."})
    repo_id: str | None = option(None, "Where on the Hub: owner/name. Without it only the card is written.")
    private: bool = option(False, "Make the repository private, if it is new; else it is as the account's default.")
    revision: str | None = option(None, "An existing branch of the repository; by default main.")
    dry_run: bool = option(False, "Print what would be uploaded; upload nothing, and write nothing.")
    teacher: str | None = option(None, "Where the teacher is now, if it has moved; 'none' leaves it out of the card.")
    measure_again: bool = option(False, "Measure and draw anew what lies in the folder already.")


def publish(arguments: PublishArguments, card: CardArguments, data: DataArguments | None = None) -> str:
    """Write the card of a run and upload the folder; with `dry_run` neither.

    Args:
        data: where the data are now; by default where the run had them.

    Returns:
        What to tell: the address of the commit, or what would be uploaded.

    Raises:
        PublishError, HubError, PrivacyError: see there; nothing local is lost.
    """
    folder, options = Path(arguments.folder), (arguments.teacher, arguments.measure_again)
    uploads = arguments.repo_id is not None and not arguments.dry_run
    if uploads and card.license is None and folder.is_dir():
        require_license(folder, licenses_of_sources(folder))
    if arguments.dry_run:
        with copy_of(folder) as copy:
            write_model_card(copy, card, arguments.repo_id, data, *options)
            return describe_upload(copy, arguments.repo_id).replace(str(copy), str(folder))
    write_model_card(folder, card, arguments.repo_id, data, *options)
    if arguments.repo_id is None:
        return describe_upload(folder, None)
    private, revision = arguments.private or None, arguments.revision
    command = resume_command(folder, arguments.repo_id, card, private, revision)
    return upload(folder, arguments.repo_id, command, private=private, revision=revision)


def write_model_card(
    folder: str | Path,
    card: CardArguments | None = None,
    repo_id: str | None = None,
    data: DataArguments | None = None,
    teacher: str | None = None,
    measure_again: bool = False,
) -> Path:
    """Measure and draw what is not yet in a finished run's folder, and write its model card; nothing is uploaded.

    Args:
        folder: the output folder of the run.
        card: licence, links, and the detectors to compare with; of those nothing said keeps what is measured already.
        repo_id: where the model will be on the Hub, `owner/name`: the card's code then loads it from there.
        data, teacher: where they are now, if they have moved; the teacher "none" is left out of the card.
        measure_again: measure and draw anew what lies in the folder already.

    Returns:
        The path of the card, `README.md` in the folder.

    Raises:
        PublishError: the run is not finished, or recorded no evaluation.
        DetectorLoadError, DatasetError, IncompatibleTeacherError: a model or the data cannot be read.
    """
    from d3etr_hf.visualization.run_pictures import is_drawn

    folder, card = Path(folder), card or CardArguments()
    _require_run_folder(folder)
    for place, what in ((teacher, "teacher"), *((path, title) for title, path in (card.compared() or {}).items())):
        if place not in (None, NO_TEACHER) and Path(place).exists():  # one that is gone may be measured already
            refuse_other_place(place, f"{what} {place!r}")
    # another teacher, or other data, are other figures
    again = measure_again or teacher is not None or data is not None
    if (measure_again or data is not None) and not card.compare:
        _refuse_unnamed_rows(folder)
    if again or not (is_measured(folder, card.compared()) and is_drawn(folder)):
        return prepare(load_run(folder, data, teacher), card, repo_id, again)
    # all that a card needs lies in the folder: models and data may be gone by now
    return _write_card(folder, select_rows(folder, card.compared()), card, repo_id)


def prepare(run: PublishedRun, card: CardArguments, repo_id: str | None = None, again: bool = False) -> Path:
    """Everything that lies beside the weights of a published model: metrics, pictures, the card (returned)."""
    # here, since the trainer imports this file and must not need matplotlib
    from d3etr_hf.visualization.run_pictures import draw_pictures

    metrics = measure_run(run, card.compared(), again)
    draw_pictures(run.folder, run.record(HISTORY), run.val, run.models)
    return _write_card(run.folder, metrics, card, repo_id)


def _write_card(folder: Path, metrics: dict, card: CardArguments, repo_id: str | None) -> Path:
    path = write_card(folder, metrics, card, repo_id)
    if license_in(folder) is None:
        logger.warning(f"{without_license(folder, metrics.get('licenses', {}))}; an upload is refused without it")
    return path


def licenses_of_sources(folder: Path) -> dict[str, str]:
    """Role → licence of the models that a finished run learned and started from, as far as their cards are here."""
    configuration = read_configuration(folder)
    found = licenses_of(teacher=configuration.get("teacher"), started_from=configuration.get("model"))
    return (read_metrics(folder) or {}).get("licenses", {}) | found


def resume_command(
    folder: Path, repo_id: str, card: CardArguments, private: bool | None = None, revision: str | None = None
) -> str:
    """The command that publishes this folder, which is measured already, with every argument that matters."""
    words = ["d3etr", "publish", str(folder), "--repo_id", repo_id]
    if private:
        words.append("--private")
    if revision is not None:
        words += ["--revision", revision]
    for name, value in asdict(card).items():
        if value:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join(words)


@contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A run's folder once more under another path, to write into and to be forgotten: the folder stays as it is.

    Its files are links, which a file that is written whole replaces. Errors within name the folder itself.
    """
    _require_run_folder(folder)
    with TemporaryDirectory(prefix="d3etr_hf_dry_run_") as place:
        copy = Path(place).resolve() / folder.resolve().name
        copy.mkdir()
        for path in folder.resolve().iterdir():
            if path.is_dir():
                (copy / path.name).mkdir()
            else:
                _link(path, copy / path.name)
        try:
            yield copy
        except UserError as error:
            error.args = (str(error).replace(str(copy), str(folder)),)
            raise


def _link(path: Path, place: Path) -> None:
    try:
        os.symlink(path, place)
    except OSError:  # Windows lets not everybody make links
        shutil.copyfile(path, place)


def _require_run_folder(folder: Path) -> None:
    if folder.is_file():
        raise PublishError(f"{folder} is a file: name the folder of a finished run, here {folder.parent}")
    if not folder.is_dir():
        raise PublishError(f"{folder}: there is no such folder; name that of a finished run")


def _refuse_unnamed_rows(folder: Path) -> None:
    """Where the detectors are that were compared is not known any more, so they cannot be measured anew."""
    if rows := (read_metrics(folder) or {}).get("compared"):
        raise PublishError(
            f"{folder} is to be measured anew, and of {', '.join(rows)} nothing says where it is: name all by "
            "--compare 'title=folder', or give --compare none"
        )

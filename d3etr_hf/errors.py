"""What can go wrong in ways that the user can put right; commands show these without a traceback."""

import reprlib
from typing import Any

MOST_CHARACTERS = 120  # that a message takes of what somebody wrote, or of what a library says


class UserError(Exception):
    """Base of every error whose message says what is wrong, where, and what to do.

    Attributes:
        of_all_processes: whether all processes of a launch raise it; then one of them shows it.
    """

    of_all_processes = False


class _Quoting(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out integers of thousands of digits
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


_QUOTING = _Quoting()
_QUOTING.maxstring = _QUOTING.maxother = MOST_CHARACTERS
_QUOTING.maxlevel = 3


def quoted(value: Any) -> str:
    """A user's value as a message shows it: its `repr`, shortened to a part of a line whatever the value is."""
    return one_line(_QUOTING.repr(value))


def one_line(text: object, most: int = MOST_CHARACTERS) -> str:
    """What a library says, or another long text, in one line of at most so many characters."""
    line = " ".join(str(text)[: 4 * most].split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


class CommandLineError(UserError, ValueError):
    """The arguments given on the command line or in a configuration file cannot be used as they are."""


class ConfigurationError(UserError, ValueError):
    """A configuration file cannot be read."""


class DatasetError(UserError, ValueError):
    """A data set cannot be used as it is."""


class ImageSizeError(UserError, ValueError):
    """Images are of a size, or sized in a way, that a model cannot take."""


class IncompatibleDataError(UserError, ValueError):
    """The data are not of the classes that the student predicts."""


class DetectorLoadError(UserError, ValueError):
    """A detector cannot be loaded or built as asked."""


class IncompatibleTeacherError(UserError, ValueError):
    """The teacher cannot teach this student as the options say."""


class UnsupportedOptionError(UserError, ValueError):
    """An option of Transformers or Accelerate that this trainer cannot honour."""


class BatchSizeError(UserError, RuntimeError):
    """A batch of training images does not fit in memory."""


class OutputFolderError(UserError, ValueError):
    """The output folder holds something that this run would overwrite."""


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be gone on from: it is not whole, not there, or of another run."""


class DamagedFileError(UserError, ValueError):
    """A file that a run keeps in its folder cannot be read; the message says how to do without it."""


class WriteError(UserError, RuntimeError):
    """A file cannot be written: the disk is full, or the place may not be written; nothing saved before is lost."""


class FolderInUseError(UserError, RuntimeError):
    """Another process is at work in a folder."""


class TrainingStopped(UserError, RuntimeError):
    """A training was asked to stop, and has written a checkpoint; the message has the command that goes on.

    Attributes:
        exit_code: 128 + the signal that stopped it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class NonFiniteLossError(UserError, RuntimeError):
    """A loss term or a prediction became NaN or infinite; the last checkpoint is untouched."""


class NonFiniteCostError(UserError, ValueError):
    """A matching cost is NaN or infinite: the predictions have diverged.

    Attributes:
        layer, image: position of the first such cost in the batch.
    """

    def __init__(self, what: str, layer: int, image: int):
        super().__init__(
            f"{what}: the matching cost of decoder layer {layer}, image {image} of the batch is NaN or infinite, so "
            "the predictions have diverged (if the teacher's: try it by `d3etr evaluate`; if the student's: lower "
            "the learning rate)"
        )
        self.what, self.layer, self.image = what, layer, image


class EvaluationError(UserError, ValueError):
    """Not every image of a split was evaluated, so that the others would count as without a detection."""


class PictureError(UserError, ValueError):
    """A picture cannot be drawn as asked."""


class PublishError(UserError, RuntimeError):
    """A folder cannot be published as it is; the message says what is missing and what to do."""


class PrivacyError(UserError, RuntimeError):
    """What is to be published holds a secret."""


class HubError(UserError, RuntimeError):
    """The Hub did not take an upload; nothing local is lost."""


class OnnxExportError(UserError, RuntimeError):
    """There is no ONNX file to be had of this detector; the message says why and what to do."""


class ShapesError(UserError, ValueError):
    """The synthetic data set cannot be made as asked."""


class DemoError(UserError, RuntimeError):
    """A run of the demonstration failed."""


class ComparisonError(UserError, RuntimeError):
    """A run of a comparison failed, or its results cannot be read."""

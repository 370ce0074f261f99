"""Export a trained detector to ONNX, for images and batches of any size, and check it against PyTorch.

    d3etr export runs/demo/distilled
    d3etr export user/student --output student.onnx --data_folder data/shapes

Needs `pip install 'd3etr_hf[onnx]'`. Writes model.onnx and onnx_check.json into the folder. The check uses validation
images, from where the run had its data unless told otherwise; a file that computes something else is not kept.
"""

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments
from d3etr_hf.publishing.onnx_check import ExportArguments, check_in_words, export_and_check


def main() -> None:
    """What `d3etr export` runs."""
    arguments, data = parse_arguments((ExportArguments, DataArguments), description=__doc__, first_argument="folder")
    given = None if data == DataArguments() else data
    print(check_in_words(export_and_check(**vars(arguments), data_arguments=given)))

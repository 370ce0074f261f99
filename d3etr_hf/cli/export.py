"""Export a trained detector to ONNX, for batches of any number, and check it against PyTorch.

    d3etr export runs/demo/distilled
    d3etr export runs/demo/distilled --precision int8  # or fp16: model_int8.onnx, model_fp16.onnx
    d3etr export user/student --output student.onnx --data_folder data/shapes

Needs `pip install 'd3etr_hf[onnx]'`. Writes model.onnx and onnx_check.json into the folder. The check uses validation
images, from where the run had its data unless told otherwise; a file that computes something else is not kept. Its
average precision is measured on all of them (--ap_images says otherwise).

The file takes images of any size where the family's decoder attends to one dense memory. Those that sample a memory of
several levels are exported for images of one size: that of the model's image processor, or, where this keeps an
image's proportions, padded to the square of its longest edge (a smaller long_side makes a faster file).
"""

from d3etr_hf.cli.command_line import parse_arguments
from d3etr_hf.data import DataArguments
from d3etr_hf.publishing.onnx_check import ExportArguments, export_and_check
from d3etr_hf.publishing.onnx_record import check_in_words


def main() -> None:
    """What `d3etr export` runs."""
    arguments, data = parse_arguments((ExportArguments, DataArguments), description=__doc__, first_argument="folder")
    given = None if data == DataArguments() else data
    print(check_in_words(export_and_check(**vars(arguments), data_arguments=given)))

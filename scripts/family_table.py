"""What holds of every family, as largest differences on perturbed tiny models: the table of CONTRIBUTING's promises.

    python scripts/family_table.py
    python scripts/family_table.py --onnx   # and an exported file in onnxruntime: minutes, needs d3etr_hf[onnx]

Own group against the stock class in eval and in train mode; own group with and without a further group; the saved
checkpoint in the stock class; logits and boxes alike. In onnxruntime, on more images than it was traced with, logits /
scores / boxes. Lines are those of the family's own file.
"""

import argparse
import inspect
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForObjectDetection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3etr_hf.models.loading import FAMILIES
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest
from tests.tiny import padded_batch, random_queries, small_image_processor, tiny_model


def difference(logits, boxes, others) -> float:
    pairs = zip((logits, boxes), others, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def last_of(output):
    group = output.groups[OWN]
    return group.logits[-1], group.boxes[-1]


@torch.no_grad()
def row_of(family: str) -> list[str]:
    """Lines, and the four differences."""
    model, batch = tiny_model(model_type=family), padded_batch()
    request = GroupRequest({AUXILIARY: random_queries(5, model.width, 9, model.anchor_size)})
    found = []
    for training in (False, True):
        stock = model.train(training).to_stock().train(training)(**batch)
        ours = last_of(model(**batch, request=GroupRequest()))
        found.append(difference(*ours, [part[:, : model.query_count] for part in (stock.logits, stock.pred_boxes)]))
    model.eval()
    alone = last_of(model(**batch, request=GroupRequest()))
    found.append(difference(*alone, last_of(model(**batch, request=request))))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stock = AutoModelForObjectDetection.from_pretrained(folder)(**batch)
    found.append(difference(*alone, (stock.logits, stock.pred_boxes)))
    lines = len(Path(inspect.getfile(FAMILIES[family])).read_text().splitlines())
    return [FAMILIES[family].title, str(lines), *(f"{value:.1e}" for value in found)]


@torch.no_grad()
def onnx_differences(family: str) -> str:
    """Of logits, scores and boxes."""
    import onnxruntime

    from d3etr_hf.publishing.onnx_export import OnnxDetector, export_onnx, size_for_export

    model = tiny_model(model_type=family).eval()
    size = size_for_export(model, small_image_processor(family, 64, 64))
    batch = padded_batch(3, 64 if size is None else size[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, {}, size)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        theirs = session.run(None, {name: batch[name].numpy() for name in ("pixel_values", "pixel_mask")})
    ours = OnnxDetector(model).eval()(batch["pixel_values"], batch["pixel_mask"])
    pairs = zip(ours, theirs, strict=True)
    return " / ".join(f"{float((own - torch.from_numpy(other)).abs().max()):.1e}" for own, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", action="store_true", help="export each family, too")
    onnx = parser.parse_args().onnx
    columns = ["family", "lines", "parity, eval", "parity, train", "isolation", "stock reload"] + ["ONNX"] * onnx
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for family in tqdm(FAMILIES, leave=False):
        row = row_of(family) + ([onnx_differences(family)] if onnx else [])
        tqdm.write("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()

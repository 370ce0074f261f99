"""What holds of every family, as largest differences on perturbed tiny models: the table of CONTRIBUTING's promises.

    python scripts/family_table.py

Own group against the stock class in eval and in train mode; own group with and without a further group; the saved
checkpoint in the stock class. Logits and boxes alike. Lines are those of the family's own file.
"""

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
from tests.tiny import padded_batch, random_queries, tiny_model


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


def main() -> None:
    print("| family | lines | parity, eval | parity, train | isolation | stock reload |\n| --- |" + " --- |" * 5)
    for family in tqdm(FAMILIES, leave=False):
        tqdm.write("| " + " | ".join(row_of(family)) + " |")


if __name__ == "__main__":
    main()

"""What is known of the ONNX files beside a model: kept in one JSON file, and told in words and code."""

from pathlib import Path

from d3etr_hf.files import read_json
from d3etr_hf.publishing.onnx_precision import FILES, FLOAT32
from d3etr_hf.publishing.privacy import anonymise, write_published_json

MODEL, CHECK = FILES[FLOAT32], "onnx_check.json"
# the groups of images that are compared, as `check_in_words` tells of them
GROUPS = {
    "one_by_one": "alone",
    "other_sizes": "at other sizes",
    "padded_batch": "as a padded batch",
    "batch": "as a batch",
}


def read_checks(folder: Path) -> dict[str, dict]:
    """File name → what `d3etr export` found out about it, of the ONNX files in a folder, without paths of a machine.

    Raises:
        DamagedFileError: `onnx_check.json` is no JSON.
    """
    if not (folder / CHECK).exists():
        return {}
    content = read_json(folder / CHECK, "remove it, and export again")
    checks = content.items() if isinstance(content, dict) else ()
    return anonymise({name: check for name, check in checks if isinstance(check, dict) and "onnx" in check})


def record_check(path: Path, check: dict) -> None:
    """Keep what was found out about one ONNX file, beside what is known of the others in its folder."""
    write_published_json(path.with_name(CHECK), read_checks(path.parent) | {path.name: check})


def check_in_words(check: dict) -> str:
    """One or two sentences about `export_and_check`, for a report or a card."""
    box, score = (max(group[key] for group in check["differences"].values()) for key in ("box_pixels", "score"))
    times = check["milliseconds"]
    *groups, last = (words for name, words in GROUPS.items() if name in check["differences"])
    compared = f"{', '.join(groups)} and {last}" if groups else last
    measured = ""
    if "AP" in check:
        than = f", in float32 {100 * check['AP_float32']:.1f}" if "AP_float32" in check else ""
        measured = f" AP {100 * check['AP']:.1f}{than} (images: {check['AP_images']:,}); {check['megabytes']:g} MB."
    return (
        f"On {check['images']} images of {check['data']}, {compared}, boxes differ "
        f"from PyTorch's by at most {box:.2g} pixels and scores by {score:.2g}; an image takes "
        f"{times['onnxruntime']:.1f} ms, with PyTorch {times['pytorch']:.1f} ms (CPU, {check['threads']} threads)."
        f"{measured}"
    )


def onnx_snippet(repo_id: str | None = None, threshold: float = 0.4, file: str = MODEL) -> str:
    """Python that detects objects with onnxruntime and the image processor.

    Args:
        repo_id: where the model is on the Hub; None reads it from the current folder.
        threshold: above which scores are shown.
        file: the name of the ONNX file.
    """
    hub, path = "", f'"{file}"'
    if repo_id is not None:
        hub, path = "from huggingface_hub import hf_hub_download\n", f'hf_hub_download("{repo_id}", "{file}")'
    return SNIPPET.format(hub=hub, path=path, model_id=repo_id or ".", threshold=threshold)


SNIPPET = """\
import json
import numpy as np
import onnxruntime
{hub}from PIL import Image
from transformers import AutoImageProcessor

session = onnxruntime.InferenceSession({path})
processor = AutoImageProcessor.from_pretrained("{model_id}", backend="pil")
metadata = session.get_modelmeta().custom_metadata_map
names, padding = json.loads(metadata["id2label"]), json.loads(metadata["padding"])

image = Image.open("photograph.jpg").convert("RGB")
inputs = dict(processor(images=image, return_tensors="np", **padding))
inputs.setdefault("pixel_mask", np.ones_like(inputs["pixel_values"][:, 0], dtype=np.int64))
scores, boxes = session.run(["scores", "pred_boxes"], inputs)
for query, label in np.argwhere(scores[0] > {threshold}):
    x, y, width, height = boxes[0, query] * [*image.size, *image.size]
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    print(names[str(label)], f"{{scores[0, query, label]:.2f}}", np.round(corners, 1).tolist())
"""

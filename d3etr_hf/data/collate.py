"""Examples of different sizes to one padded batch."""

from collections.abc import Sequence

import torch

from d3etr_hf.data.sampling import TrainingSample
from d3etr_hf.outputs.targets import pack


class DetectionCollator:
    """Pads images at the right and the bottom to the largest height and width of the batch.

    Boxes stay as they are: normalised by each image's own, unpadded size. Images that only fill up the last step of
    an epoch (`TrainingSample.repeated`) are left out.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """Makes the batch.

        Args:
            examples: from `DetectionTransform`, each with `pixel_values` (3, H, W) and `labels`; with
                `teacher_pixel_values` and `batch_sizes` all or none. Of `batch_sizes` one is drawn, to which the
                student's images, all of one size, are resized together (RT-DETR's augmentation). In training it is
                one for all batches of an optimizer step: the samples of the data set say of which.

        Returns:
            `pixel_values` (B, 3, max H, max W) float32, zero where padded; `pixel_mask` (B, max H, max W) int64, one
            where there is an image; `teacher_pixel_values` and `teacher_pixel_mask` where the examples have the first,
            of sizes of their own; `targets` (B, T, 5) float32, see `pack`; `labels`, per image what is needed on the
            host, as plain numbers: `image_id`, `objects` (how many), `orig_size` (height, width in pixels), and of
            images without labels `labeled`, false, and no objects. Where all images are repeated ones the batch is the
            first of them without its objects, and `labels` is empty: it counts for nothing.
        """
        own = [example for example in examples if not _is_repeated(example)]
        labels = [_labels_of(example) for example in own]
        examples = own or examples[:1]
        images = [example["pixel_values"] for example in examples]
        batch = _padded(_resized_together(images, examples[0].get("batch_sizes", ()), examples[0].get("sample")))
        if "teacher_pixel_values" in examples[0]:
            of_teacher = _padded([example["teacher_pixel_values"] for example in examples])
            batch |= {f"teacher_{name}": value for name, value in of_teacher.items()}
        return batch | {
            "targets": pack(labels) if labels else torch.zeros(1, 0, 5),
            "labels": [
                {
                    "image_id": int(label["image_id"]),
                    "objects": len(label["class_labels"]),
                    "orig_size": label["orig_size"].tolist(),
                    **({} if example.get("labeled", True) else {"labeled": False}),
                }
                for example, label in zip(own, labels, strict=True)
            ],
        }


def _is_repeated(example: dict) -> bool:
    return "sample" in example and example["sample"].repeated


def _labels_of(example: dict) -> dict[str, torch.Tensor]:
    labels = example["labels"]
    if example.get("labeled", True):
        return labels
    return labels | {"class_labels": labels["class_labels"][:0], "boxes": labels["boxes"][:0]}


def _padded(images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Images (3, H, W) as `pixel_values` and `pixel_mask`."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    pixel_values = torch.zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def _resized_together(
    images: list[torch.Tensor], sizes: Sequence[tuple[int, int]], sample: TrainingSample | None
) -> Sequence[torch.Tensor]:
    """Images of one size at one of these heights and widths, drawn for all; as they are where there is none."""
    if not sizes:
        return images
    generator = None if sample is None else torch.Generator().manual_seed(sample.step_seed)
    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    return torch.nn.functional.interpolate(torch.stack(images), size=size, mode="bilinear")

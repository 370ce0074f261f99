"""Examples of different sizes to one padded batch."""

from collections.abc import Sequence

import torch

from d3etr_hf.outputs.targets import pack


class DetectionCollator:
    """Pads images at the right and the bottom to the largest height and width of the batch.

    Boxes stay as they are: normalised by each image's own, unpadded size.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """Makes the batch.

        Args:
            examples: from `DetectionTransform`, each with `pixel_values` (3, H, W) and `labels`; with
                `teacher_pixel_values` and `batch_sizes` all or none. Of `batch_sizes` one is drawn, to which the
                student's images, all of one size, are resized together (RT-DETR's augmentation).

        Returns:
            `pixel_values` (B, 3, max H, max W) float32, zero where padded; `pixel_mask` (B, max H, max W) int64, one
            where there is an image; `teacher_pixel_values` and `teacher_pixel_mask` where the examples have the first,
            of sizes of their own; `targets` (B, T, 5) float32, see `pack`; `labels`, per image what is needed on the
            host, as plain numbers: `image_id`, `objects` (how many) and `orig_size` (height, width in pixels).
        """
        labels = [example["labels"] for example in examples]
        images = [example["pixel_values"] for example in examples]
        batch = _padded(_resized_together(images, examples[0].get("batch_sizes", ())))
        if "teacher_pixel_values" in examples[0]:
            of_teacher = _padded([example["teacher_pixel_values"] for example in examples])
            batch |= {f"teacher_{name}": value for name, value in of_teacher.items()}
        return batch | {
            "targets": pack(labels),
            "labels": [
                {
                    "image_id": int(label["image_id"]),
                    "objects": len(label["class_labels"]),
                    "orig_size": label["orig_size"].tolist(),
                }
                for label in labels
            ],
        }


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


def _resized_together(images: list[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> Sequence[torch.Tensor]:
    """Images of one size at one of these heights and widths, drawn for all; as they are where there is none."""
    if not sizes:
        return images
    size = sizes[int(torch.randint(len(sizes), ()))]
    return torch.nn.functional.interpolate(torch.stack(images), size=size, mode="bilinear")

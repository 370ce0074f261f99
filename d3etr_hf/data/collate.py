"""Examples of different sizes to one padded batch."""

import torch

from d3etr_hf.outputs.targets import pack


class DetectionCollator:
    """Pads images at the right and the bottom to the largest height and width of the batch.

    Boxes stay as they are: normalised by each image's own, unpadded size.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """Makes the batch.

        Args:
            examples: from `DetectionTransform`, each with `pixel_values` (3, H, W) and `labels`.

        Returns:
            `pixel_values` (B, 3, max H, max W) float32, zero where padded; `pixel_mask` (B, max H, max W) int64, one
            where there is an image; `targets` (B, T, 5) float32, see `pack`; `labels`, per image what is needed on the
            host, as plain numbers: `image_id`, `objects` (how many) and `orig_size` (height, width in pixels).
        """
        images = [example["pixel_values"] for example in examples]
        labels = [example["labels"] for example in examples]
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        pixel_values = torch.zeros(len(images), 3, height, width)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
        for index, image in enumerate(images):
            pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
            pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
        return {
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
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

"""Image classification with plain PyTorch models and with those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.errors import DataError
from fedveil.tasks.task import (
    Batch,
    Classification,
    Dataset,
    Prepared,
    column,
    logits_of,
    missing_column,
)

__all__ = ["ImageClassification"]


class ImageClassification(Classification):
    """Give each image one of several classes.

    Images may be tensors ([C, H, W] or [H, W]), or numpy arrays, nested lists or PIL images
    ([H, W] or [H, W, C]). They are decoded batch by batch, so a large data set stays where it is.

    Args:
        image: The column of images.
        label: The column of class numbers.
        num_labels: How many classes there are; None to learn it from the model's output.
        transform: Called with each image as float32 [C, H, W], for instance to resize or
            normalise. Only randomness drawn from torch repeats with the seed.
    """

    name = "image-classification"

    def __init__(
        self,
        *,
        image: str = "image",
        label: str = "label",
        num_labels: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(label=label, num_labels=num_labels)
        self.image, self.transform = image, transform

    def validate(self, data: Dataset) -> None:
        """Check all labels, and that the first row has an image (decoding all would be slow).

        Raises:
            DataError: Naming the row and what is wrong with it.
        """
        self.check_labels(data)
        self.read(data[0])

    def prepare(self, data: Dataset | Prepared) -> Prepared:
        """Check the data; images stay as they are until they are needed."""
        if isinstance(data, Prepared):
            return data
        self.validate(data)
        return Prepared(data)

    def labels_of(self, data: Prepared) -> list[int]:
        """The class of each row."""
        return [int(label) for label in column(data.rows, self.label)]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Images as float32 [B, C, H, W], and labels [B].

        Raises:
            DataError: The images are not of one size.
        """
        images = [self.read(row) for row in rows]
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            raise DataError(
                "images of one batch have different shapes",
                expected="one shape [C, H, W]",
                found=", ".join(str(list(shape)) for shape in shapes),
                where=f'column "{self.image}"',
                fix="Give the task a transform that makes them alike.",
            )
        labels = [int(row[self.label]) for row in rows]
        return {"images": torch.stack(images), "labels": torch.tensor(labels, dtype=torch.int64)}

    def read(self, row: Mapping[str, Any]) -> Tensor:
        """One row's image as float32 [C, H, W], transformed; 8-bit pixels become 0 to 1."""
        if self.image not in row:
            raise missing_column(self.image, [str(key) for key in row])
        pixels = _as_tensor(row[self.image], where=f'column "{self.image}"')
        return pixels if self.transform is None else self.transform(pixels)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores per class, shape [B, C]; images take the type of the model's weights."""
        images = batch["images"].to(_floating_type(model))
        # Models of transformers carry a config and take images by keyword only.
        output = model(pixel_values=images) if hasattr(model, "config") else model(images)
        return logits_of(output, model, "B, C")


def _as_tensor(image: Any, *, where: str) -> Tensor:
    try:
        pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    except (TypeError, ValueError) as error:
        raise _no_image(where, type(image).__name__) from error
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.ndim != 3:
        raise _no_image(where, f"{type(image).__name__} of shape {list(pixels.shape)}")
    elif not isinstance(image, Tensor):
        pixels = pixels.permute(2, 0, 1)
    # Only 8-bit pixels have a known range; other numbers are taken as they are.
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _no_image(where: str, found: str) -> DataError:
    return DataError(
        "a row holds no image",
        expected="a tensor, array or PIL image with 2 or 3 axes",
        found=found,
        where=where,
    )


def _floating_type(model: nn.Module) -> torch.dtype:
    types = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(types, torch.float32)

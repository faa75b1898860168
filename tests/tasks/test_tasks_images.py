import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.errors import DataError
from fedveil.tasks import ImageClassification, Task
from fedveil.training import Trainer, Training, evaluate
from training_samples import images, perceptron

TASK = ImageClassification(num_labels=3)


def read(image, **options):
    return ImageClassification(**options).read({"image": image})


def test_it_is_a_task():
    assert isinstance(TASK, Task)


def test_eight_bit_pixels_become_zero_to_one():
    grey = np.array([[0, 255], [51, 102]], dtype=np.uint8)
    expected = torch.tensor([[[0.0, 1.0], [0.2, 0.4]]])
    torch.testing.assert_close(read(grey), expected)
    torch.testing.assert_close(read(torch.from_numpy(grey)), expected)
    assert read(grey).dtype == torch.float32


def test_other_pixels_are_taken_as_they_are():
    assert read(np.full((2, 2), 7.0)).max() == 7.0
    assert read([[0, 300], [1, 2]]).max() == 300.0


def test_channels_come_first():
    array = np.zeros((4, 5, 3), dtype=np.uint8)
    assert read(array).shape == (3, 4, 5)
    assert read(torch.zeros(3, 4, 5)).shape == (3, 4, 5)
    assert read(torch.zeros(4, 5)).shape == (1, 4, 5)


def test_pil_images():
    pil = pytest.importorskip("PIL.Image")
    assert read(pil.new("L", (5, 4), 255)).shape == (1, 4, 5)
    colour = read(pil.new("RGB", (5, 4), (255, 0, 51)))
    assert colour[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_the_transform_sees_scaled_pixels_with_channels():
    assert read(np.full((2, 2), 255, np.uint8), transform=lambda x: x * 2).tolist() == [
        [[2, 2]] * 2
    ]


def test_the_callers_array_is_not_changed():
    array = np.zeros((2, 2), dtype=np.float32)
    read(array, transform=lambda x: x.add_(1))
    assert not array.any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"image": torch.zeros(2, 2), "label": 3}], "0 to 2, found 3"),
        ([{"pixels": torch.zeros(2, 2), "label": 0}], "no column 'image'.*'pixels'"),
        ([{"image": "cat.png", "label": 0}], "no image.*found str"),
        ([{"image": None, "label": 0}], "no image.*found NoneType"),
        ([{"image": torch.zeros(1, 1, 2, 2), "label": 0}], r"no image.*\[1, 1, 2, 2\]"),
    ],
)
def test_unusable_data(rows, message):
    with pytest.raises(DataError, match=message):
        TASK.prepare(rows)


def test_different_sizes_in_one_batch():
    rows = [{"image": torch.zeros(s, s), "label": 0} for s in (2, 3)]
    with pytest.raises(DataError, match=r"\[1, 2, 2\], \[1, 3, 3\]"):
        TASK.collate(rows)


def test_accuracy_and_loss_by_hand():
    class Fixed(nn.Module):
        """The image is the logits."""

        def forward(self, images):
            return images.flatten(1)

    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    labels = [0, 1, 2, 0]
    rows = [{"image": s[None], "label": y} for s, y in zip(scores, labels, strict=True)]
    result = evaluate(Fixed(), TASK, rows, batch_size=3)
    loss = -np.mean([scores.log_softmax(1)[i, y].item() for i, y in enumerate(labels)])
    # Found are 0, 1, 0, 1: F1 of the classes is 1/2, 2/3 and 0.
    f1 = pytest.approx(100 * (1 / 2 + 2 / 3 + 0) / 3)
    assert result == {"accuracy": 50.0, "loss": pytest.approx(loss), "f1": f1}


def test_models_of_transformers_are_called_by_keyword():
    class Vit(nn.Module):
        config = object()

        def __init__(self):
            super().__init__()
            self.inner = perceptron()

        def forward(self, pixel_values=None):
            return SimpleNamespace(logits=self.inner(pixel_values))

    vit = Vit()
    plain = copy.deepcopy(vit.inner)
    assert evaluate(vit, TASK, images(9)) == evaluate(plain, TASK, images(9))


def test_a_real_vit_trains():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    record = Trainer(TASK, images(6, side=8), Training(steps=2)).train(model, seed=0)
    assert record.steps == 2


def test_a_convolution_with_batch_norm_trains_on_one_image():
    # BatchNorm2d normalises over pixels too, so one image is enough for it.
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip
    record = Trainer(TASK, images(1), Training(steps=2)).train(model, seed=0)
    assert record.steps == 2

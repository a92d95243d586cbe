"""Scikit-learn's handwritten digits, some of them with a wrong label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CLASSES", "SIDE", "NoisyDigits"]

CLASSES = 10
SIDE = 8
# What is neither trained on nor kept clean is tested on.
_TRAINING = 600
_CLEAN = 100
_BRIGHTEST = 16


@dataclass(frozen=True)
class NoisyDigits:
    """Images of 8 x 8 in three parts, the labels of one of them partly wrong.

    Images are fp32 in 0 to 1, shape ``(n, 64)``; labels int64, shape ``(n,)``.

    Attributes:
        images: Trained on; a sample's id is its row.
        given: Labels that are trained on.
        true: What the images show.
        clean_images: Held out, for questions that need labels that are known to be right.
        clean_labels: Of those.
        test_images: For the accuracy alone.
        test_labels: Of those.
    """

    images: Tensor
    given: Tensor
    true: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, share: float, seed: int) -> NoisyDigits:
        """Split at random and give a share of the training samples another label, each with equal chance.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        images, labels = _digits()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        parts = [_TRAINING, _CLEAN, len(images) - _TRAINING - _CLEAN]
        (train, clean, test), (true, clean_labels, test_labels) = images[order].split(parts), labels[order].split(parts)
        flipped = torch.randperm(_TRAINING, generator=generator)[: round(share * _TRAINING)]
        given = true.clone()
        given[flipped] = (true[flipped] + torch.randint(1, CLASSES, flipped.shape, generator=generator)) % CLASSES
        return cls(train, given, true, clean, clean_labels, test, test_labels)

    @property
    def mislabelled(self) -> Tensor:
        """Which training samples have a wrong label, bool; for nothing but the count at the end."""
        return self.given != self.true


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which cannot be imported; `make dev` installs it, "
            "elsewhere `pip install scikit-learn`"
        ) from error
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / _BRIGHTEST, torch.from_numpy(labels).long()

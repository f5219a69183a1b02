"""Position in the sample stream -> what is trained on: pure functions of (seed, position), whatever worker is asked."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.data import Dataset

from dinoengine.data.collate import CropSample, LabelledImage
from dinoengine.data.dataset import DataError, ImageDataset
from dinoengine.data.decode import UnreadableImageError, is_machine_fault
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.reduced_decode import asking
from dinoengine.data.samplers import PositionSampler
from dinoengine.structures import BadImage
from dinoengine.utils.env import hash_seed
from dinoengine.utils.printable import printable

# Images that are tried in place of one that cannot be used. If half of all are bad, one position in 2**17 finds none.
NUM_REPLACEMENTS = 16
_REPLACEMENT = 0xBAD1


class TrainingStream(Dataset[CropSample]):
    """position -> crops.

    An image that cannot be loaded is replaced by that of another position of the same epoch. Attempt k looks at a position
    that depends on (seed, position, k) alone, and the crops are drawn from the generator of the position asked for: the
    same for any number of workers and processes, and in a resumed run. What was passed over travels with the sample.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: PositionSampler,
        augmentation: Any,
        seed: int,
        num_replacements: int = 0,
    ) -> None:
        """
        Args:
            num_replacements: images tried in place of one that cannot be loaded; 0: it is an error.
        """
        self.dataset = dataset
        self.sampler = sampler
        self.augmentation = augmentation
        self.seed = seed
        self.num_replacements = num_replacements

    def __getitem__(self, position: int) -> CropSample:
        """
        Raises:
            DataError: if neither the image nor any of its replacements can be loaded, or the augmentation fails.
        """
        index, image, bad_images = self._load(position)
        try:
            global_crops, local_crops = self.augmentation(image, position_rng(self.seed, position, CROPS))
        except Exception as error:
            raise DataError(self._failed("Augmenting", index, position, error)) from error
        return CropSample(position, index, global_crops, local_crops, bad_images, self.dataset.source(index))

    def index_at(self, position: int, attempt: int = 0) -> int:
        """Index of the image at a position, or of its replacement number ``attempt`` >= 1."""
        if attempt:
            size = self.sampler.size
            epoch_start = position - position % size
            position = epoch_start + hash_seed(self.seed, position, attempt, _REPLACEMENT) % size
        return self.sampler.index_at(position)

    def _load(self, position: int) -> tuple[int, Any, tuple[BadImage, ...]]:
        """(index, image, the images that were passed over)."""
        bad: dict[int, BadImage] = {}
        for attempt in range(self.num_replacements + 1):
            index = self.index_at(position, attempt)
            if index in bad:  # in a small set attempts meet the same image
                continue
            try:
                with self.reading(position):
                    return index, self.dataset.load(index), tuple(bad.values())
            except Exception as error:
                if is_machine_fault(error) or not self.num_replacements:
                    raise DataError(self._failed("Loading", index, position, error)) from error
                bad[index] = BadImage(position, self.dataset.describe(index), _cause(error))
        listed = "\n".join(f"  {printable(image.path)}: {printable(image.cause)}" for image in list(bad.values())[:3])
        raise DataError(
            f"Position {position} of the stream has no image that can be used: its own and {self.num_replacements} tries "
            f"to replace it met {len(bad)} bad image(s) and no good one. Check DATASETS.TRAIN; the first of them:\n{listed}"
        )

    def reading(self, position: int) -> AbstractContextManager[None]:
        """While it runs, JPEGs are decoded as small as the crops of a position allow (INPUT.REDUCED_DECODE)."""
        reduction = getattr(self.augmentation, "reduction", None)  # an augmentation of a user's own may have none
        return asking(reduction and (lambda size: reduction(size, position_rng(self.seed, position, CROPS))))

    def _failed(self, doing: str, index: int, position: int, error: Exception) -> str:
        return f"{doing} {printable(self.dataset.describe(index))} (position {position} of the stream) failed: {error}"


def _cause(error: Exception) -> str:
    if isinstance(error, UnreadableImageError):
        return error.cause
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


class LabelledStream(Dataset[LabelledImage]):
    """position -> one crop and its label: of the replacement where an image was replaced."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream
        self.dataset: ImageDataset = stream.dataset

    def __getitem__(self, position: int) -> LabelledImage:
        sample = self.stream[position]
        num_views = len(sample.global_crops) + len(sample.local_crops)
        if num_views != 1:
            raise DataError(
                f"The augmentation made {num_views} views of an image, and a classifier is trained on one; set "
                "INPUT.AUGMENTATION SingleCrop."
            )
        label = self.dataset.label(sample.image_index)
        return LabelledImage(
            sample.global_crops[0], label, sample.image_index, bad_images=sample.bad_images, source=sample.source
        )

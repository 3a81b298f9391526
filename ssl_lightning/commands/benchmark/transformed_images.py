"""Images as users of lightly give them to a DataLoader: Pillow images that a transform turns into views."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ssl_lightning.data.images import ImageArray, Images


class TransformedImages(Dataset[Any]):
    """A dataset of transformed Pillow images.

    Args:
        images: Color images in memory, or files that each example opens.
        transform: Takes a Pillow image.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform
        self.sources: list[Any] = (
            [Image.fromarray(images.batch(index).permute(1, 2, 0).numpy()) for index in range(len(images))]
            if isinstance(images, ImageArray)
            else [images.name(index) for index in range(len(images))]
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Any:
        source = self.sources[index]
        return self.transform(Image.open(source).convert("RGB") if isinstance(source, str) else source)

"""Several views of one image, over whose features the mean is taken."""

import torch
from PIL import Image
from torchvision import transforms

CROPS = (1, 5)


class FiveCrops:
    """A transform that crops an image at its corners and its centre, where the one it is made of crops once.

    With the mirror images (`flip`) these are the ten crops of AlexNet (Krizhevsky et al. 2012, section 4.1).

    >>> steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    >>> FiveCrops(transforms.Compose(steps))(Image.new("RGB", (60, 40))).shape
    torch.Size([5, 3, 32, 32])
    """

    def __init__(self, transform: object) -> None:
        """Find the centre crop.

        Args:
            transform: From a PIL image to a tensor (C, H, W): a torchvision Compose with one CenterCrop, as
                those of timm's models are. What stands before the crop is done once, what stands after it to
                each crop.

        Raises:
            ValueError: If it is none.
        """
        steps = list(getattr(transform, "transforms", []))
        places = [i for i, step in enumerate(steps) if isinstance(step, transforms.CenterCrop)]
        if len(places) != 1:
            raise ValueError(
                "crops=5 needs a transform that is a torchvision Compose with one CenterCrop, as those of "
                f"timm's models are, but it is {transform}. Give one that returns views (V, C, H, W), and "
                "omit crops."
            )
        at = places[0]
        self.before = transforms.Compose(steps[:at])
        self.crop = transforms.FiveCrop(tuple(steps[at].size))
        self.after = transforms.Compose(steps[at + 1 :])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the crops (5, C, H, W): top left, top right, bottom left, bottom right, centre."""
        return torch.stack([self.after(crop) for crop in self.crop(self.before(image))])

    def __str__(self) -> str:
        """All steps, for the record."""
        return str(transforms.Compose([*self.before.transforms, self.crop, *self.after.transforms]))

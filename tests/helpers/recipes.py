"""A recipe whose step takes milliseconds: four residual blocks of 8 channels, 16 px, batches of 8."""

import dataclasses

from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.recipes import moco_tiny_digits


def smallest(epochs: int = 3) -> Recipe:
    """Return that recipe."""
    return dataclasses.replace(
        moco_tiny_digits(),
        global_batch_size=8,
        bn_group_size=4,
        queue_size=16,
        crop_px=16,
        epochs=epochs,
        model_args={"layers": [1, 1, 1, 1], "stem_chs": 8, "channels": [8, 8, 8, 8]},
    )

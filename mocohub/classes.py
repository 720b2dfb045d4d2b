"""Class names, and the position of each image's class among them: by folders, or by what lists say."""

import os
from collections.abc import Collection, Iterable, Sequence

_SPLITS = {"train", "val", "test", "valid", "validation"}

Classes = tuple[list[int | None] | None, list[str] | None]  # positions, None where unknown, and the names


def classes_of_folders(source: str, paths: list[str], *, demanded: bool) -> Classes:
    """Take the first folder of each path as its class.

    Returns:
        None twice if some path has no folder, or all are in one, unless classes are `demanded`.

    Raises:
        ValueError: If they are demanded and some path has no folder; or not, and the folders are splits.
    """
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]  # "" for absolute paths too
    names = set(folders)
    if not demanded:
        refuse_splits(source, {name.lower() for name in names}, names)
        if "" in names or len(names) < 2:
            return None, None
    elif "" in names:
        raise ValueError(
            f"labels='folder' needs every image of '{source}' in a sub-folder that names its class, "
            f"but '{paths[folders.index('')]}' is in none. Move it, or use labels='none'."
        )
    return _positions(folders, sorted(names))


def refuse_splits(source: str, words: set[str], names: Collection[str]) -> None:
    """Refuse `names` in the place of classes if all their `words` mean splits."""
    if not words <= _SPLITS:
        return
    names = sorted(names)
    one = f"{source}/{names[0]}"
    remedy = f"Pass one of them, such as '{one}', or" if os.path.exists(one) else "Pass"
    raise ValueError(
        f"'{source}' holds splits ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), not classes. "
        f"{remedy} mocohub.list_images(..., labels='none') to take all images unlabelled."
    )


def classes_of_texts(texts: Sequence[str | None]) -> Classes:
    """Take these texts, None where there is none, as classes."""
    names = sorted_names(text for text in texts if text is not None)
    return _positions(texts, names) if names else (None, None)


def labels_of_names(names: Sequence[str | None]) -> Classes:
    """Return the position of each class name among all of them, and these in the order of `list_images`.

    Returns:
        None twice if there are fewer than two names, or they are those of splits: then they tell no classes.
    """
    found = {name for name in names if name is not None}
    if len(found) < 2 or {name.lower() for name in found} <= _SPLITS:
        return None, None
    return classes_of_texts(names)


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return each name once: in numeric order if all are integers, else in code-point order."""
    names = set(names)
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _positions(texts: Sequence[str | None], names: list[str]) -> Classes:
    position = {name: i for i, name in enumerate(names)}
    return [position.get(text) for text in texts], names

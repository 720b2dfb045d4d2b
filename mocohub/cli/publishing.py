"""Verbs between a model and the world: convert, publish, verify, card, zoo."""

import sys
from typing import Literal

from tyro.conf import Positional


def convert(
    source: Positional[str],
    *,
    to: Literal["torchvision", "detectron2", "onnx"],
    out: str,
    encoder: Literal["query", "key"] = "query",
) -> None:
    """Write an encoder as a file for other programs; `mocohub export` writes folders for timm.

    Args:
        source: A name of the zoo, hf-hub:org/name, or what `mocohub inspect` reads: a run, an exported
            folder, a file of MoCo, PyContrast, VISSL, mmselfsup, solo-learn, lightly, torchvision or timm.
        to: "torchvision" is safetensors under torchvision's names, "detectron2" a .pkl for its MODEL.WEIGHTS,
            "onnx" a graph from images to features (extra `onnx`).
        out: File to write; must not exist.
        encoder: "query", which the papers evaluate, or "key".
    """
    from mocohub.hub.convert import convert as run

    print(run(source, out, to=to, encoder=encoder))


def publish(
    folder: Positional[str],
    *,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    training_state: str | None = None,
    message: str | None = None,
) -> None:
    """Put an exported folder on the Hugging Face Hub in one commit, load it from there, and compare.

    Args:
        folder: What `mocohub export` wrote.
        repo: org/name on the Hub; made if it does not exist.
        private: Make a new repository private.
        revision: Branch to commit to; made if it does not exist. Default: main.
        tag: Name this commit as well, for instance v1.0.
        training_state: The run or checkpoint whose full state (both encoders, heads, queue, optimiser) goes
            to training-state/ in the same commit, for `mocohub pretrain --init`.
        message: Of the commit.
    """
    from mocohub.hub.publish import publish as run

    published = run(
        folder,
        repo,
        private=private,
        revision=revision,
        tag=tag,
        training_state=training_state,
        message=message,
    )
    print(published)


def verify(source: Positional[str], *, revision: str | None = None) -> None:
    """Check a model: every SHA-256, config against weights, features of a fixed input against its manifest.

    Args:
        source: An exported folder, org/name on the Hub (its cached copy when offline), or a name of the zoo.
        revision: Branch, tag or commit on the Hub.
    """
    from mocohub.hub.verify import verify as run

    checks = run(source, revision=revision)
    print(*checks, sep="\n")
    if bad := sum(not check.ok for check in checks):
        raise RuntimeError(f"'{source}' failed {bad} of {len(checks)} checks.")


def card(
    source: Positional[str],
    *,
    results: str | None = None,
    out: str | None = None,
) -> None:
    """Render the model card of a model of the zoo or of an exported folder.

    Args:
        source: A name of `mocohub list`, or an exported folder.
        results: JSON file of measured numbers, as `mocohub knn --json FILE` writes it, or results.json of
            `mocohub evaluate`, or the folder of that, whose headline numbers are taken; an exported folder is
            given them for good.
        out: File to write. Default: print it.
    """
    from mocohub.files import replace_file
    from mocohub.hub.cards import card as run

    text = run(source, results=results)
    if out is None:
        sys.stdout.write(text)
    else:
        replace_file(out, text)
        print(out)


def zoo(*, html: str) -> None:
    """Write a page of all models with numbers, licences and commands to copy, in one static file.

    Args:
        html: The file to write, or the folder for its index.html.
    """
    from mocohub.hub.zoo_page import write_zoo_page

    print(write_zoo_page(html))

"""Verbs about models: list, info, inspect, export."""

import json
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mocohub.errors import unknown


def list_() -> None:
    """List the models of the zoo and the recipes, one a line."""
    from mocohub.hub.zoo import ZOO
    from mocohub.pretrain.recipes import RECIPES

    line = "{:<26}{:<10}{:>8}  {:<14}{:>13}  {:<8}{}".format
    print(line("name", "backbone", "params", "data", "linear top-1", "recipe", "weights"))
    where = {
        "bundled": "come with mocohub",
        "authors": "published by the authors",
        "none": "none published",
    }
    for model in ZOO.values():
        top1 = "-" if model.linear_top1_pct is None else f"{model.linear_top1_pct:.1f} %"
        millions = f"{model.num_parameters / 1e6:.1f} M"
        recipe = "yes" if model.name in RECIPES else "-"
        print(line(model.name, model.backbone, millions, model.data, top1, recipe, where[model.weights]))
    for name in [name for name in RECIPES if name not in ZOO]:
        print(line(name, RECIPES[name]().backbone, "", "your own", "-", "yes", "made by you"))


def info(name: Positional[str]) -> None:
    """Tell what is known of a model of the zoo or of a recipe.

    Args:
        name: A name of `mocohub list`.
    """
    from mocohub.hub.zoo import ZOO
    from mocohub.pretrain.recipes import RECIPES

    if name not in RECIPES and name not in ZOO:
        raise unknown("model or recipe", name, dict.fromkeys([*ZOO, *RECIPES]))
    if name in ZOO:
        model = ZOO[name]
        where = {
            "bundled": "come with mocohub",
            "authors": f"{model.weights_url} (MD5 {model.weights_md5}...)",
            "none": "nobody has published any; train it with the recipe, then `mocohub publish`",
        }
        _print_facts(
            {
                "name": name,
                "what": model.summary,
                "backbone": model.backbone,
                "parameters": f"{model.num_parameters:,}",
                "features": str(model.num_features),
                "weights": where[model.weights],
                "license": model.license or "-",
                "on the Hub": f"{model.repository}, once somebody has published it",
                "source": model.source,
                "cost": model.cost,
            }
        )
        for row in model.published:
            print(f"{'published':<20}{row.task}: {row.metric} {row.value} ({row.source})")
    if name in RECIPES:
        print()
        print(*(line.strip() for line in RECIPES[name].__doc__.strip().splitlines()), sep="\n")
        print()
        _print_facts(RECIPES[name]().to_json())


def inspect(path: Positional[str]) -> None:
    """Say what a file or folder is: a run, a checkpoint, a model, features, or a MoCo checkpoint of others.

    Args:
        path: The file or folder.
    """
    if (Path(path) / "manifest.json").is_file():
        from mocohub.features.store import Features

        features = Features.open(path)
        _print_facts(
            {"kind": "features", "content": repr(features), "classes": features.classes} | features.meta
        )
        return
    from mocohub.hub.encoders import read_encoder

    found = read_encoder(path)
    facts = {
        "kind": found.kind,
        "backbone": found.backbone or "-",
        "architecture": found.architecture,
        "model_args": found.model_args,
        "features": found.num_features,
        "tensors": len(found.state_dict),
        **found.facts,
    }
    if Path(path).is_file():  # of another project: what it is, line by line
        origin = facts.pop("origin")
        origin["encoders"] = ", ".join(origin["encoders"])
        groups = [f"{num_tensors} {group}" for group, num_tensors in origin["left_out"].items()]
        origin["left_out"] = "tensors: " + ", ".join(groups) if groups else "nothing"
        facts |= {name: value or "-" for name, value in origin.items() if name != "dialect"}
    _print_facts(facts)


def export(
    source: Positional[str],
    *,
    out: str,
    license: str,
    name: str | None = None,
    probes: str | None = None,
    encoder: Literal["query", "key"] = "query",
) -> None:
    """Write a model folder that stock timm, transformers and `mocohub.load` read.

    Args:
        source: A run, one of its checkpoints, a checkpoint file of MoCo or another project (see `mocohub
            inspect`), a name of the zoo, or hf-hub:org/name.
        out: Model folder; must not exist.
        license: Licence of the weights, by its Hub identifier (apache-2.0, cc-by-nc-4.0, other, ...).
        name: Name of the model. Default: the name of --out.
        probes: JSON file of measured numbers for the card, as `mocohub knn --json FILE` writes it.
        encoder: "query", which the papers evaluate, or "key".
    """
    from mocohub.files import read_json
    from mocohub.hub.export import export as run

    measured = read_json(probes) if probes else ()
    print(run(source, out, license=license, name=name, probes=measured, encoder=encoder))


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        print(f"{name:<19} {text}")

"""Model cards, rendered from the facts in mocohub.json and from nothing else."""

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2.exceptions import UndefinedError

from mocohub.backbones import backbone, pretrained_cfg
from mocohub.errors import unknown
from mocohub.files import read_json, replace_file
from mocohub.hub.records import check_probes, merged, read_results, refuse_other_model
from mocohub.hub.zoo import ZOO, ZooModel

TAGS = ["timm", "transformers", "image-feature-extraction", "moco", "self-supervised-learning"]

_AUTHORS_REPOSITORY = "https://github.com/facebookresearch/moco"

# https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENSES = tuple(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)


def card(source: str | Path, *, results: str | Path | None = None) -> str:
    """Return the card of a model of the zoo, or of an exported folder, as Markdown.

    Args:
        source: An exported folder, or a name of the zoo, whether its weights are published or not.
        results: JSON file with a list of measured numbers, as `mocohub knn --json` writes it; or results.json
            of `mocohub evaluate`, or the folder of that, whose headline numbers are taken. They replace those
            of the same data, metric and protocol. A folder keeps them: its mocohub.json and README.md are
            written anew, and what was cut short is made good by the next call.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If `source` is neither, `results` holds no complete records or those of other weights, or
            the README.md that had to be written anew was edited by hand.
    """
    measured, measured_model = read_results(results) if results is not None else ([], {})
    folder, model = Path(source), ZOO.get(str(source))
    if folder.is_dir() and not (model and model.bundled):
        return _folder_card(folder, measured, measured_model)
    if model is None:
        if folder.exists() or len(folder.parts) > 1:
            raise FileNotFoundError(f"'{source}' is no folder that `mocohub export` wrote.")
        raise unknown("model of the zoo", str(source), ZOO)
    if measured and model.weights == "none":
        raise ValueError(
            f"Nobody has published weights of '{model.name}', so nothing can have been measured with them. "
            "Give the exported folder of the weights that these numbers belong to."
        )
    facts = read_json(model.bundled_folder / "mocohub.json") if model.bundled else _zoo_facts(model)
    refuse_other_model(facts, measured_model)
    facts["probes"] = merged(facts["probes"], measured)
    return _render({**facts, "repo": model.repository}, model, is_of_zoo=True)


def render(facts: Mapping[str, Any]) -> str:
    """Return the card of an exported model as Markdown with the Hub's metadata on top.

    Args:
        facts: The content of its mocohub.json. `repo` ("org/name") is put into the snippets if it is there.

    Raises:
        ValueError: If a probe is incomplete, see `check_probes`.
    """
    md5 = (facts.get("origin") or {}).get("md5") or "unknown"
    converted = [model for model in ZOO.values() if model.weights_md5 and md5.startswith(model.weights_md5)]
    return _render(facts, converted[0] if converted else None)


def check_metadata(text: str) -> ModelCardData:
    """Return the metadata of a card once everything in it is what the Hub accepts of a timm model.

    The Hub itself looks only when a commit is made, and then at some fields only.

    Raises:
        ValueError: If it cannot be parsed, or says the wrong library, licence or results; the message says
            which.
    """
    try:
        block = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
        if block and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block[1])):
            raise ValueError("it has aliases (*name), by which a few lines may stand for gigabytes")
        data = ModelCard(text).data
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"The card's metadata cannot be parsed: {error}") from error
    if data.library_name != "timm" or "timm" not in (data.tags or ()):
        raise ValueError(
            f"The card says library_name {data.library_name!r} and tags {data.tags}: the Hub offers timm's "
            "snippets only if both say timm."
        )
    if data.license not in HUB_LICENSES:
        raise unknown("license in the card's metadata:", str(data.license), HUB_LICENSES)
    if data.license == "other" and not (data.license_name and data.license_link):
        raise ValueError("The card says license 'other': the Hub wants license_name and license_link too.")
    return data


def _folder_card(folder: Path, measured: list[dict[str, Any]], measured_model: Mapping[str, Any]) -> str:
    manifest, readme = folder / "mocohub.json", folder / "README.md"
    if not manifest.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no mocohub.json: it is no folder that `mocohub export` wrote."
        )
    facts = read_json(manifest)
    try:
        before = render(facts)
        if not measured:
            return before
        refuse_other_model(facts, measured_model)
        facts["probes"] = merged(facts["probes"], measured)
        after = render(facts)
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise ValueError(f"'{manifest}' does not hold what `mocohub export` writes: {error!r}.") from error
    if readme.exists() and readme.read_text(encoding="utf-8") not in (before, after):
        raise ValueError(
            f"'{readme}' was edited by hand, and rendering it anew would lose that. Move it away, run this "
            "again, then put your text back."
        )
    replace_file(readme, after)
    replace_file(manifest, json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return after


def _zoo_facts(model: ZooModel) -> dict[str, Any]:
    """What is known of a model of the papers before anybody exports it, under the manifest's names."""
    spec = backbone(model.backbone)
    return {
        "name": model.name,
        "backbone": model.backbone,
        "architecture": spec.architecture,
        "model_args": dict(spec.model_args),
        "stock_timm": True,
        "num_features": model.num_features,
        "num_parameters": model.num_parameters,
        "encoder": "query",
        "recipe_name": model.name,
        "data": {"source": model.data},
        "datasets": ["imagenet-1k"] if model.data == "ImageNet-1k" else None,
        "epochs": model.epochs,
        "steps": model.steps,
        "preprocessing": pretrained_cfg(model.backbone),
        "license": "other" if model.weights_url else "unknown",
        "license_statement": model.license
        or "there are no weights that could have one; who trains and publishes them states it.",
        "probes": [],
    }


def _render(facts: Mapping[str, Any], model: ZooModel | None, *, is_of_zoo: bool = False) -> str:
    """Fill in the template: for a repository, or for an entry of the zoo, which nobody may have published.

    `model` is the one of the zoo that these facts are of, if they are of one.
    """
    probes = check_probes(facts.get("probes", ()))
    template = importlib.resources.files("mocohub.hub").joinpath("card_template.md").read_text("utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = _cell
    name = facts["name"]
    repo = facts.get("repo") or f"ORG/{name}"
    heads = (facts.get("recipe", {}).get("head"), (facts.get("origin") or {}).get("head"))
    return environment.from_string(template).render(
        metadata=_metadata(facts, probes, model, repo).to_yaml(),
        facts=facts,
        probes=[_probe_row(probe) for probe in probes],
        has_intervals=any(probe.get("interval") for probe in probes),
        license_statement=facts.get("license_statement"),
        zoo=model,
        is_of_zoo=is_of_zoo,
        repo=repo,
        load_name=name if is_of_zoo else repo,
        timm_name=f"local-dir:{name}" if is_of_zoo else f"hf-hub:{repo}",
        transformers_name=f"./{name}" if is_of_zoo else repo,
        rows=_rows(facts, model),
        settings=_settings(facts.get("recipe", {})),
        is_v2="mlp" in heads or bool(model and model.method == "MoCo v2"),
    )


def _metadata(
    facts: Mapping[str, Any], probes: list[dict[str, Any]], model: ZooModel | None, repo: str
) -> ModelCardData:
    other = facts["license"] == "other"
    of_authors = bool(model and model.weights == "authors")
    results = [_eval_result(probe) for probe in probes]
    if of_authors and facts["encoder"] == "query":  # which is the one they evaluated
        # The Hub's client merges all results of one data set and keeps one source for them: what was measured
        # with these files must not be taken for what the authors printed, nor the other way round.
        taken = {result.unique_identifier for result in results}
        results += [r for r in [_published_result(model)] if r.unique_identifier not in taken]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=TAGS,
        license=facts["license"],
        license_name=("not-stated-by-the-authors" if of_authors else "see-model-card") if other else None,
        license_link=(_AUTHORS_REPOSITORY if of_authors else f"https://huggingface.co/{repo}#license")
        if other
        else None,
        datasets=facts.get("datasets"),
        model_name=facts["name"] if results else None,
        eval_results=results or None,
    )


def _published_result(model: ZooModel) -> EvalResult:
    arxiv = re.search(r"arXiv (\d{4}\.\d{5})", model.source)
    linear = {
        "dataset": "ImageNet-1k",
        "dataset_id": "imagenet-1k",
        "split": "validation",
        "metric": "top-1 (%)",
        "value": model.linear_top1_pct,
        "protocol": "linear probe on frozen features, published by the authors",
    }
    url = f"https://arxiv.org/abs/{arxiv[1]}" if arxiv else _AUTHORS_REPOSITORY
    return dataclasses.replace(_eval_result(linear), source_name=model.source, source_url=url)


def _eval_result(probe: Mapping[str, Any]) -> EvalResult:
    task, metric = ("image-classification", "Image Classification"), "accuracy"
    if probe["metric"].startswith(("mAP", "recall@")):
        task = ("image-feature-extraction", "Image Retrieval")
        metric = "mean_average_precision" if probe["metric"].startswith("mAP") else "recall"
    return EvalResult(
        task_type=task[0],
        task_name=task[1],
        dataset_type=probe.get("dataset_id") or re.sub(r"[^a-z0-9]+", "-", probe["dataset"].lower()),
        dataset_name=probe["dataset"],
        dataset_split=probe.get("split"),
        metric_type=metric,
        metric_value=probe["value"],
        # The Hub merges the results of one task and data set: only this name tells two protocols apart.
        metric_name=f"{probe['metric']} ({probe['protocol']})",
    )


def _probe_row(probe: Mapping[str, Any]) -> tuple[Any, ...]:
    """Data, metric, value and protocol of one measurement."""
    data = ", ".join(filter(None, (probe["dataset"], probe.get("split"))))
    if "num_images" in probe:
        data += f" ({probe['num_images']:,} images)"
    protocol = probe["protocol"] + (f" ({probe['source']})" if "source" in probe else "")
    value = str(probe["value"])
    if probe.get("interval"):
        value += " [{:g}, {:g}]".format(*probe["interval"])
    return data, probe["metric"], value, protocol


def _rows(facts: Mapping[str, Any], model: ZooModel | None) -> list[tuple[str, Any]]:
    """Facts known of this model, as the card's table has them."""
    data, origin = facts.get("data", {}), facts.get("origin") or {}
    network = f"{facts['backbone']}: timm `{facts['architecture']}`"
    if facts["model_args"]:
        network += " with " + ", ".join(f"`{name}={value}`" for name, value in facts["model_args"].items())
    pre = facts["preprocessing"]
    checksum = next((f" ({key.upper()} {origin[key]})" for key in ("md5", "sha256") if origin.get(key)), "")
    rows = [
        ("Network", network),
        ("Parameters", f"{facts['num_parameters']:,}"),
        ("Features", facts["num_features"]),
        ("Input", f"{pre['input_size'][-1]} px RGB, crop_pct {pre['crop_pct']}, {pre['interpolation']}"),
        ("Mean, std", f"{pre['mean']}, {pre['std']}"),
        ("Training images", data.get("source")),
        ("Number of images", f"{data['num_images']:,}" if "num_images" in data else None),
        ("Recipe", facts.get("recipe_name")),
        ("Steps", facts.get("steps")),
        ("Epochs", facts.get("epochs")),
        ("Images seen", f"{facts['num_images_seen']:,}" if "num_images_seen" in facts else None),
        ("Cost of training", model.cost if model else None),
        ("Converted from", f"{origin['file']}{checksum}" if origin else None),
        ("That file is by", origin.get("written_by")),
        ("Assumed of it", origin.get("assumed")),
        ("Trained with", _versions(facts.get("versions"))),
        ("Commit", facts.get("commit")),
        ("Exported with", _versions(facts.get("exported_with"))),
        ("SHA-256 of the weights", facts.get("sha256", {}).get("model.safetensors")),
        ("License", facts["license"]),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _versions(versions: Mapping[str, str] | None) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None


def _settings(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A recipe's fields as (dotted name, value)."""
    rows = []
    for name, value in recipe.items():
        nested = isinstance(value, Mapping) and value
        rows += _settings(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return rows


def _cell(value: Any) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")

"""Model cards, rendered from the facts in mocohub.json and from nothing else."""

import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

TAGS = ["timm", "transformers", "image-feature-extraction", "moco", "self-supervised-learning"]

# What a probe's record must state: a number without its protocol compares with nothing.
PROBE_KEYS = ("dataset", "metric", "value", "protocol")

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


def check_probes(probes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of measured numbers, each complete.

    Args:
        probes: Each with `dataset`, `metric` ("top-1 (%)"), `value`, `protocol` ("kNN, k=200, T=0.07"), and
            if known `dataset_id` (on the Hub), `split`, `num_images`, `source`.

    Raises:
        ValueError: If a record lacks one of the first four, or its value is not a finite number.
    """
    probes = [dict(probe) for probe in probes]
    for probe in probes:
        if missing := [key for key in PROBE_KEYS if probe.get(key) in (None, "")]:
            raise ValueError(
                f"The probe {probe} lacks {', '.join(missing)}. A number is published with its protocol "
                f"or not at all: give {', '.join(PROBE_KEYS)}."
            )
        value = probe["value"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"The value {value!r} of the probe {probe} is not a finite number.")
    return probes


def render(facts: Mapping[str, Any]) -> str:
    """Return the card of an exported model as Markdown with the Hub's metadata on top.

    Args:
        facts: The content of its mocohub.json. `repo` ("org/name") is put into the snippets if it is there.
    """
    probes = check_probes(facts.get("probes", ()))
    template = importlib.resources.files("mocohub.hub").joinpath("card_template.md").read_text("utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = _cell
    return environment.from_string(template).render(
        metadata=_metadata(facts, probes).to_yaml(),
        facts=facts,
        probes=[_probe_row(probe) for probe in probes],
        license_statement=facts.get("license_statement"),
        repo=facts.get("repo") or f"ORG/{facts['name']}",
        rows=_rows(facts),
        settings=_settings(facts.get("recipe", {})),
    )


def _metadata(facts: Mapping[str, Any], probes: list[dict[str, Any]]) -> ModelCardData:
    other = facts["license"] == "other"
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=TAGS,
        license=facts["license"],
        license_name="see-model-card" if other else None,
        datasets=facts.get("datasets"),
        model_name=facts["name"] if probes else None,
        eval_results=[_eval_result(probe) for probe in probes] or None,
    )


def _eval_result(probe: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=probe.get("dataset_id") or re.sub(r"[^a-z0-9]+", "-", probe["dataset"].lower()),
        dataset_name=probe["dataset"],
        dataset_split=probe.get("split"),
        metric_type="accuracy",
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
    return data, probe["metric"], probe["value"], protocol


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facts known of this model, as the card's table has them."""
    data, origin = facts.get("data", {}), facts.get("origin", {})
    network = f"{facts['backbone']}: timm `{facts['architecture']}`"
    if facts["model_args"]:
        network += " with " + ", ".join(f"`{name}={value}`" for name, value in facts["model_args"].items())
    pre = facts["preprocessing"]
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
        ("Converted from", f"{origin['file']} (MD5 {origin['md5']})" if origin else None),
        ("Trained with", _versions(facts.get("versions"))),
        ("Commit", facts.get("commit")),
        ("Exported with", _versions(facts["exported_with"])),
        ("SHA-256 of the weights", facts["sha256"]["model.safetensors"]),
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

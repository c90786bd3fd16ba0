"""The README.md beside an exported model: what it is, where it comes from, its numbers and how to make it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from rotpruner import embedded
from rotpruner.artifacts import write_text
from rotpruner.provenance import commit, versions
from rotpruner.pruners import PRUNERS, Pruner

CARD = "README.md"
#: What was done, by basis.
_METHODS = {
    "none": "One-shot, in the model's own basis: nothing is rotated.",
    "pca": "One-shot, in the basis of the residual stream's principal directions.",
    "permutation": "One-shot, after reordering the features of each space; nothing is learned.",
    "random": "One-shot, in a random basis: a control, not a usable model.",
    "learned": "In a basis learned by the loss of the pruned model; the rotations are merged into the weights.",
    "recovery": "The surviving weights were trained to match the dense model's predictions; zeros stayed zero.",
}
#: What a row of results is.
_ROWS = {
    "dense": "the model as it came",
    "pruner": "control: the same pruner in the model's own basis",
    "start": "control: the same pruner in the basis where learning began",
    "pca": "control: the same slice in the basis of principal directions, nothing learned",
    "random_rotation": "control: the same pruner in a random basis",
    "no_update": "control: this model before the weight update",
    "first_fit": "control: what the first of its two fits has made",
    "rotpruner": "this model",
    "pruned": "this model",
    "recovered": "this model",
}


@dataclass(frozen=True)
class Origin:
    """Where a pruned model comes from.

    Attributes:
        base_model: name or path of the dense model.
        pattern: what was removed, as `2:4`, `0.5` or `slice:0.3`.
        pruner: short name or import path; None for a slice.
        basis: `none`, `pca`, `permutation`, `random` or `learned`; `recovery` if weights were trained, in whatever
            basis they were in.
        pruned: of a recovery, the checkpoint that it began with.
        taken_over: of learning after an update, the pruned model whose kept weights it began with.
        spaces: which spaces rotate.
        update: pruner whose weight update followed, if any.
        learned_masks: whether the pruner's masks were only where learning began.
        layer_sparsity: how the blocks share the pattern.
        exceptions: patterns of linears whose names match.
        calibration: name of the text, with `num_sequences` of `seq_len` tokens of it.
        second_steps: those of the steps that were of a second fit, after the update of the first one.
        steps: of learning; `training_tokens` were read by all of them together.
        seed: of calibration, order and random starts.
        rows: measured models, as in `results.json`.
        evaluation: how perplexities were measured, in words.
        command: that made it, if one did.
        config: of that command, if it has one.
    """

    base_model: str
    pattern: str
    pruner: str | None = None
    basis: str = "none"
    pruned: str | None = None
    taken_over: str | None = None
    spaces: Sequence[str] = ()
    update: str | None = None
    learned_masks: bool = False
    layer_sparsity: str = "uniform"
    exceptions: Mapping[str, str | float] = field(default_factory=dict)
    calibration: str = ""
    num_sequences: int = 0
    seq_len: int = 0
    steps: int = 0
    second_steps: int = 0
    training_tokens: int = 0
    seed: int = 0
    rows: Sequence[Mapping[str, Any]] = ()
    evaluation: str = ""
    command: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def evaluation_of(seq_len: int, max_tokens: int | None) -> str:
    """How perplexities were measured, as `Origin.evaluation` says it."""
    first = f"the first {max_tokens:,} tokens" if max_tokens is not None else "all tokens"
    return f"in float32 over windows of {seq_len:,} tokens that do not overlap, {first} of each text"


def write_card(directory: str | Path, origin: Origin, base_config: Any = None, made_at: str | None = None) -> None:
    """Write the card of an exported model, with the licence of its base and the code's versions and commit.

    Args:
        directory: of the export.
        origin: where it comes from; local paths in it may be whole, the card has their last parts only.
        base_config: `transformers` config of the base model, in case that names a licence.
        made_at: commit of the code that made the model; the present one if left out.
    """
    facts = Origin(**public(asdict(origin)))
    known = license_of(origin.base_model, base_config)
    name, at = Path(directory).resolve().name, made_at or commit()
    text = model_card(facts, name=name, license=known, online=_is_online(directory), commit=at, versions=versions())
    write_text(text, Path(directory) / CARD)


def _fenced(command: str) -> str:
    return f"```\n{command}\n```"


def _is_online(directory: str | Path) -> bool:
    """Whether products of rotations run with the model of a checkpoint, as its config says."""
    config = Path(directory) / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("shortcuts"))


def public(value: Any) -> Any:
    """The same strings, lists and mappings, in which local paths have shrunk to their last part.

    A path is what exists here, begins like one (`/`, `./`, `../`, `~`) or has more than one slash; a URL is none.
    """
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if not isinstance(value, str) or "\n" in value or "://" in value or "/" not in value:
        return value
    begins = value.startswith(("/", "./", "../", "~"))
    if begins or os.path.exists(value):  # which says no to what is too long for a path, as commands can be
        return Path(value).name
    if " " in value:  # a command or a sentence
        return " ".join(public(word) for word in value.split(" "))
    return Path(value).name if value.count("/") > 1 else value


def license_of(base_model: str, config: Any = None) -> dict[str, str]:
    """What the base checkpoint itself says about its licence, as front matter; nothing is guessed or downloaded.

    Read from the README.md in its directory (of a hub model: in the hub's cache), else from its config.
    """
    if base_model in embedded.ORIGINS:
        return {"license": embedded.ORIGINS[base_model][1]}
    readme = Path(base_model).expanduser() / CARD
    try:
        if not Path(base_model).expanduser().is_dir() and base_model.count("/") == 1:
            cached = try_to_load_from_cache(base_model, CARD)
            readme = Path(cached) if isinstance(cached, str) else readme
        matter = metadata_load(readme) if readme.is_file() else None
    except (ValueError, OSError, yaml.YAMLError):
        matter = None
    named = matter if isinstance(matter, dict) and isinstance(matter.get("license"), str) else vars(config or object)
    if not isinstance(named.get("license"), str):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: named[key] for key in keys if isinstance(named.get(key), str)}


def pruner_name(pruner: Pruner) -> str:
    """Its short name, or the import path of its class, with the arguments that `resolve_pruner` was given."""
    path = f"{type(pruner).__module__}.{type(pruner).__qualname__}"
    name = next((name for name, known in PRUNERS.items() if known == path), path)
    arguments = ", ".join(f"{key}={value!r}" for key, value in pruner.given_arguments.items())
    return f"{name}({arguments})" if arguments else name


def model_card(
    origin: Origin,
    *,
    name: str,
    license: Mapping[str, str] = {},
    online: bool = False,
    commit: str | None = None,
    versions: Mapping[str, str] = {},
) -> str:
    """The card as Markdown with the hub's YAML front matter. Pure: it reads nothing and writes nothing.

    Args:
        origin: what is known, free of private paths.
        name: of the directory that holds the model.
        license: front matter about the licence; none if none was found.
        online: whether products of rotations run with the model.
        commit, versions: of the code.
    """
    hub_name = embedded.ORIGINS.get(origin.base_model, (origin.base_model,))[0]
    kind = "sliced" if origin.pattern.startswith("slice") else "sparse"
    found = [] if origin.exceptions else [origin.pattern]
    tags = ["rotpruner", "pruning", kind, *found, *([origin.pruner.partition("(")[0]] if origin.pruner else [])]
    matter = ModelCardData(
        base_model=hub_name if "/" in hub_name else None,  # the hub takes nothing else as a name
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
    )
    parts = [
        f"---\n{matter.to_yaml()}\n---",
        f"# {_title(origin)}",
        _METHODS[origin.basis] + online * " What remains of them are changes of basis in the residual connections.",
        _table(("", ""), _facts(origin, hub_name, license)),
        "## Numbers",
        *_numbers(origin),
        "## Use",
        _use(name, kind, online),
        "## How it was made",
        *_made(origin, commit, versions),
    ]
    return "\n\n".join(parts) + "\n"


def _roles(origin: Origin) -> dict[str, str]:
    """What each row is to this model."""
    return _ROWS | ({"pruned": "the same before recovery"} if origin.pruned else {})


def _title(origin: Origin) -> str:
    by = f" by {origin.pruner}" if origin.pruner else ", recovered" if origin.pruned else ""
    excepted = " with exceptions" if origin.exceptions else ""
    return f"{origin.base_model.split('/')[-1]}, {origin.pattern}{excepted}{by}"


def _facts(origin: Origin, hub_name: str, license: Mapping[str, str]) -> list[tuple[str, str]]:
    base = f"`{origin.base_model}`"
    if hub_name != origin.base_model:
        base += f", the weights of {hub_name} dequantised from 4 bits"
    facts = [
        ("base model", base),
        ("licence", license.get("license", "not found beside the base checkpoint: see its own page")),
    ]
    excepted = [f"`{pattern}` in `{names}`" for names, pattern in origin.exceptions.items()]
    facts.append(("pattern", ", but ".join([f"`{origin.pattern}`", *excepted])))
    if origin.pruner:
        facts.append(("pruner", origin.pruner + (f", weights updated by {origin.update}" if origin.update else "")))
        if origin.learned_masks:
            facts.append(("masks", "learned together with the rotations, from the pruner's on"))
        facts.append(("sparsity of the blocks", origin.layer_sparsity))
    if origin.taken_over:
        known = f"`{origin.taken_over}`, whose kept weights it began with; its own card says how they were made"
        facts.append(("learning continued from", known))
    if origin.pruned:
        facts.append(("pruned model", f"`{origin.pruned}`, whose own card says how it was pruned"))
    else:
        facts.append(("rotated spaces", ", ".join(origin.spaces) or "none"))
    tokens = f"{origin.num_sequences} × {origin.seq_len:,} = {origin.num_sequences * origin.seq_len:,} tokens"
    facts.append(("calibration", f"{origin.calibration}: {tokens}" if origin.num_sequences else "none"))
    learning = f"{origin.steps} steps, {origin.training_tokens:,} tokens" if origin.steps else "none"
    if origin.second_steps:
        learning += f"; the last {origin.second_steps} steps in a second fit, under the masks of the first"
    if origin.basis == "learned" and not origin.steps:
        learning = "in another run, whose rotations were given"
    return [*facts, ("learning", learning), ("seed", str(origin.seed))]


def _numbers(origin: Origin) -> list[str]:
    if not origin.rows:
        return ["Not measured."]
    texts = list(dict.fromkeys(text for row in origin.rows for text in row.get("ppl", {})))
    cells = []
    for row in origin.rows:
        ppl = [f"{row['ppl'][text]:,.2f}" if text in row.get("ppl", {}) else "" for text in texts]
        sizes = [f"{row['parameters'] / 1e6:,.1f} M", f"{row['seconds']:,.0f}"]
        cells.append((row["name"], _roles(origin).get(row["name"], ""), f"{row['sparsity']:.4f}", *ppl, *sizes))
    head = ("", "", "sparsity", *(f"perplexity, {text}" for text in texts), "parameters", "seconds")
    parts = [_table(head, cells)]
    if origin.evaluation and texts:
        parts.append(f"Perplexity {origin.evaluation}.")
    elif not texts:
        parts.append("Perplexity was not measured.")
    found = {row["name"] for row in origin.rows}
    if origin.pruned:  # its control, the same after pruning without rotations, is another run
        return parts
    missing = [row for row in ("dense", "pruner or pca", "random_rotation") if not found & set(row.split(" or "))]
    if missing and origin.basis == "learned":
        parts.append(f"Not measured in this run: {', '.join(missing)}.")
    elif missing:
        parts.append("No dense model or control was measured in this run.")
    return parts


def _use(name: str, kind: str, online: bool) -> str:
    zeros = "" if kind == "sliced" else "The weights are stored dense, zeros included: as they are, they save no time. "
    remote = ", trust_remote_code=True" if online else ""
    needs = (
        "Its residual connections carry basis changes, by the one modelling file beside this card"
        if online
        else ("An ordinary checkpoint; nothing of RotPruner is needed to run it")
    )
    return (
        f"{needs}.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{remote})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"{zeros}If this directory holds `packed_config.json`, it is packed: load it with `rotpruner.load`."
    )


def _made(origin: Origin, commit: str | None, versions: Mapping[str, str]) -> list[str]:
    parts = [_fenced(origin.command) if origin.command else "With RotPruner's Python interface."]
    if origin.config:
        config = yaml.safe_dump(dict(origin.config), sort_keys=False)
        parts.append(f"`config.yaml` (of local paths the last part only):\n\n```yaml\n{config}```")
    code = ", ".join(f"{package} {version}" for package, version in versions.items())
    return [*parts, f"{code or 'Versions unknown'}; commit {commit or 'unknown'}."]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

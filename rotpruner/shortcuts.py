"""Basis changes of the residual stream that stay online: put into a model, saved with it, counted.

Shapes: d = width of the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rotpruner.errors import InputError
from rotpruner.families import family_of
from rotpruner.layout import residual_sublayers
from rotpruner.modeling_rotated import Rotated, Shortcut, add_shortcuts

_PREFIX = "rotated_"


def _known() -> dict[str, type[Any]]:
    """Model classes with shortcuts by the plain model type; `transformers` learns their names."""
    classes = {}
    model_class: Any
    for model_class in Rotated.__subclasses__():
        config_class = model_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        # Saving one copies the file that defines it beside the weights.
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
        classes[config_class.model_type.removeprefix(_PREFIX)] = model_class
    return classes


ROTATED_CLASSES = _known()


@torch.no_grad()
def insert_shortcuts(model: nn.Module, changes: dict[int, Tensor]) -> None:
    """Let sublayers of a plain model, by their numbers, carry their residual connection by T (d, d); in place."""
    config: Any = model.config
    family = family_of(config)
    sublayers = [[sublayer.norm, sublayer.writer] for sublayer in residual_sublayers(config)]
    config.shortcuts = {"blocks": family.blocks, "sublayers": sublayers, "changes": sorted(changes)}
    add_shortcuts(model)
    for shortcut, number in zip(shortcuts_of(model), sorted(changes), strict=True):
        shortcut.weight.copy_(changes[number])
        shortcut.weight.requires_grad_(False)


def shortcuts_of(model: nn.Module) -> list[Shortcut]:
    """The shortcuts of a model, in data-flow order."""
    return [module for module in model.modules() if isinstance(module, Shortcut)]


class OnlineCost(NamedTuple):
    """What a model runs and holds besides the ordinary one.

    Attributes:
        parameters: count.
        flops: operations a token, 2 d² for each basis change.
    """

    parameters: int
    flops: int


def online_cost(model: nn.Module) -> OnlineCost:
    """What the shortcuts of a model cost."""
    entries = sum(shortcut.weight.numel() for shortcut in shortcuts_of(model))
    return OnlineCost(entries, 2 * entries)


def check_exportable(config: Any) -> None:
    """Raise `InputError` if no class loads models of this type with shortcuts."""
    if config.model_type not in ROTATED_CLASSES:
        raise InputError(
            f"no class loads {config.model_type} models with online rotations: "
            f"choose placement shared, or a model of {', '.join(ROTATED_CLASSES)}"
        )


def exportable(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a class whose checkpoints load with their shortcuts; the model itself if it has none.

    Raises:
        InputError: there is no such class for its family.
    """
    if not shortcuts_of(model) or isinstance(model, Rotated):
        return model
    check_exportable(model.config)
    model_class = ROTATED_CLASSES[model.config.model_type]
    settings = model.config.to_dict()
    settings.pop("model_type")
    with torch.device("meta"):
        exported = model_class(model_class.config_class(**settings))
    exported.load_state_dict(model.state_dict(), assign=True)
    exported.generation_config = model.generation_config
    return exported

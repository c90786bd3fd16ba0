"""The protocol of a pruner, and the table of their names.

A pruner sees one linear at a time: its weight W (O, I) and the second moment of its input,
H = E[x xᵀ] (I, I), both already in the basis in which pruning happens. It answers with a mask and,
if its method has one, with an updated weight. Choosing a mask and updating under a given mask are
separate decisions: `prune(…, mask=M)` keeps M.

A new pruner is one file with one subclass of `Pruner`; it is named in a config by its import path,
`my_module.MyPruner`, or by a short name once it stands in `PRUNERS`.
"""

from __future__ import annotations

import ast
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from rotpruner.errors import InputError
from rotpruner.patterns import Pattern
from rotpruner.statistics import Moment

#: What a pruner needs to know of a linear's input: nothing, E[x_j²] of each feature, or all of E[x xᵀ].
Needs = Literal["nothing", "diagonal", "full"]


class Pruner(ABC):
    """Scores weights, chooses masks, and may update what is left.

    `needs` tells how much of the input's second moment `saliency` and `prune` read; `rebuilds`, whether `prune` updates
    the weights that stay, so that it wants to know what pruned predecessors give, not what they gave before.
    """

    needs: ClassVar[Needs] = "diagonal"
    rebuilds: ClassVar[bool] = False
    #: What `resolve_pruner` was given for the constructor, for cards and tables.
    given_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def saliency(self, weight: Tensor, moment: Moment | None) -> Tensor:
        """How much each weight matters, (O, I) non-negative float32; differentiable in both arguments.

        Args:
            weight: (O, I), in the basis of pruning.
            moment: second moment of the input in the same basis; None only if `needs` is `"nothing"`.
        """

    def importance(self, weight: Tensor, moment: Moment | None) -> Tensor:
        """What removing each weight costs, (O, I) in squares of the output: Wanda's W² E[x²] and the like.

        Arguments as in `saliency`, and differentiable like it.
        """
        return self.saliency(weight, moment).square()

    def mask(self, weight: Tensor, moment: Moment | None, pattern: Pattern) -> Tensor:
        """The weights that stay, (O, I) bool."""
        return pattern.mask(self.saliency(weight, moment))

    def prune(
        self, weight: Tensor, moment: Moment | None, pattern: Pattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prune one weight: (weight (O, I) with zeros outside the mask, mask (O, I) bool).

        Args:
            weight: (O, I); not changed in place.
            moment: as in `saliency`.
            pattern: what the mask must look like.
            mask: keep exactly these weights instead of choosing.
        """
        if mask is None:
            mask = self.mask(weight, moment, pattern)
        return weight * mask, mask

    def prune_group(
        self,
        weights: Sequence[Tensor],
        moment: Moment | None,
        pattern: Pattern,
        masks: Sequence[Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Prune linears that read one input, such as q, k and v: the same results as `prune` of each.

        Args:
            weights: each (O_k, I).
            moment: as in `saliency`, of the input they share.
            pattern: what each mask must look like.
            masks: keep exactly these weights, each (O_k, I) bool, instead of choosing.
        """
        given = [None] * len(weights) if masks is None else masks
        return [self.prune(weight, moment, pattern, mask) for weight, mask in zip(weights, given, strict=True)]


#: Short names. Values are import paths, so that naming a pruner costs the import of that pruner only.
PRUNERS = {
    "magnitude": "rotpruner.pruners.magnitude.Magnitude",
    "wanda": "rotpruner.pruners.wanda.Wanda",
    "ria": "rotpruner.pruners.ria.RIA",
    "sparsegpt": "rotpruner.pruners.sparsegpt.SparseGPT",
    "alps": "rotpruner.pruners.alps.ALPS",
}


def resolve_pruner(name: str | Pruner) -> Pruner:
    """A pruner by its short name or by the import path of a `Pruner` subclass.

    Arguments of its constructor may follow as in Python, `sparsegpt(damping=0.1)`: keywords, with plain values.

    Raises:
        InputError: no such name, module or class, the class is not a `Pruner`, or it does not take the arguments.
    """
    if isinstance(name, Pruner):
        return name
    if not isinstance(name, str):
        raise InputError(f"pruner {name!r} is neither a name nor an object of a Pruner subclass; call the class")
    given, (name, arguments) = name, _call(name)
    path = PRUNERS.get(name, name)
    module_name, _, class_name = path.rpartition(".")
    known = f"choose one of {', '.join(PRUNERS)}, or give the import path of a Pruner subclass"
    if not module_name:
        raise InputError(f"unknown pruner '{name}'; {known}")
    try:
        pruner_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of a leading dot
        raise InputError(f"unknown pruner '{name}' ({error}); {known}") from None
    if not (isinstance(pruner_class, type) and issubclass(pruner_class, Pruner)):
        raise InputError(f"'{name}' is not a subclass of rotpruner.pruners.Pruner; {known}")
    try:
        pruner = pruner_class(**arguments)
    except TypeError as error:  # abstract methods, or arguments
        raise InputError(f"pruner '{given}' cannot be made: {error}") from None
    if arguments:
        object.__setattr__(pruner, "given_arguments", arguments)  # it may be frozen
    return pruner


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword arguments of `name(key=value, …)`; a name alone has none."""
    if "(" not in text:
        return text, {}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no call with keywords only")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"pruner '{text}' is not of the form name(key=value, ...) with plain values: {error}"
        ) from None
    return ast.unparse(call.func), {str(key): value for key, value in arguments.items()}

"""Learn orthogonal rotations of a language model so that it prunes well, merge them away, keep a plain checkpoint."""

from rotpruner.allotment import Allotment
from rotpruner.api import prune, save
from rotpruner.errors import InputError
from rotpruner.learning import SecondFit, learn
from rotpruner.loading import load_model, load_tokenizer
from rotpruner.loading import load_model as load
from rotpruner.objectives import Objective
from rotpruner.oneshot import prune_model
from rotpruner.packed import pack, unpack
from rotpruner.perplexity import perplexity
from rotpruner.recovery import SparseRecovery
from rotpruner.rotated_model import RotatedModel
from rotpruner.rotation_artifact import Rotations
from rotpruner.rotations import LearnedRotations, merge_rotations, random_rotations
from rotpruner.semi_structured import semi_structured
from rotpruner.surrogates import Surrogate

__version__ = "0.1.0"

__all__ = [
    "Allotment",
    "InputError",
    "LearnedRotations",
    "Objective",
    "RotatedModel",
    "Rotations",
    "SecondFit",
    "SparseRecovery",
    "Surrogate",
    "learn",
    "load",
    "load_model",
    "load_tokenizer",
    "merge_rotations",
    "pack",
    "perplexity",
    "prune",
    "prune_model",
    "random_rotations",
    "save",
    "semi_structured",
    "unpack",
]

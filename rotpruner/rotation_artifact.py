"""Rotations as an artifact, with the verbs of PEFT: save, load, push, merge.

A directory of `rotations.safetensors` (the matrices Q in float32, by space) and `rotation_config.json` (the model
that they were learned on). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rotpruner.artifacts import new_directory, write_json, write_text
from rotpruner.errors import InputError, explained
from rotpruner.identity import fingerprint
from rotpruner.placements import turns
from rotpruner.rotations import check_rotation, merge_rotations

_FORMAT = 1


class Rotations(Mapping[str, Tensor]):
    """The rotations of one model: a mapping from its spaces to their matrices Q (S, B, n, n), float32, on the CPU.

    Of the space `mlp`, to the order (layers, intermediate size) int64 of its features.

    A directory of `rotations.safetensors` and `rotation_config.json` on disk and on the hub.

    Args:
        matrices: by space.
        model_type: `config.model_type` of the model.
        model_fingerprint: of its weights, see `fingerprint`.
        base_model: its name, if known.
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], *, model_type: str, model_fingerprint: str, base_model: str | None = None
    ) -> None:
        self._matrices = {
            space: Q.detach().to("cpu", torch.float32 if turns(space) else torch.int64).contiguous()
            for space, Q in matrices.items()
        }
        self.model_type, self.model_fingerprint, self.base_model = model_type, model_fingerprint, base_model
        self._what = "the rotations"

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor], model: nn.Module) -> Rotations:
        """The rotations of a model that is in its own basis still."""
        config: Any = model.config
        name: str = getattr(config, "_name_or_path", "")
        # Of a local directory only the last part: where it lies is nobody else's business.
        name = Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name
        return cls(
            matrices, model_type=config.model_type, model_fingerprint=fingerprint(model), base_model=name or None
        )

    def __getitem__(self, space: str) -> Tensor:
        return self._matrices[space]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{space} {tuple(Q.shape)}" for space, Q in self.items())
        return f"Rotations({shapes}; of {self.base_model or f'a {self.model_type} model'})"

    def save_pretrained(self, directory: str | Path, replace: bool = False) -> None:
        """Write the directory, whole or not at all.

        Raises:
            InputError: it holds something already and is not to be replaced.
        """
        config = {
            "format": _FORMAT,
            "model_type": self.model_type,
            "model_fingerprint": self.model_fingerprint,
            "base_model": self.base_model,
            "spaces": {space: list(Q.shape) for space, Q in self.items()},
        }
        with new_directory(directory, replace) as scratch:
            save_file(self._matrices, scratch / "rotations.safetensors")
            write_json(config, scratch / "rotation_config.json")

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Rotations:
        """Read rotations, and check that they are whole.

        Args:
            name: directory, or hub name (owner/name).
            revision: branch, tag or commit on the hub.
            token: of the hub; None takes the one that is logged in.

        Raises:
            InputError: missing or damaged files, or the hub does not give them.
        """
        directory = _local_or_downloaded(name, revision, token)
        config_path, tensors_path = directory / "rotation_config.json", directory / "rotations.safetensors"
        for path in (config_path, tensors_path):
            if not path.is_file():
                raise InputError(f"no rotations at '{name}': {path.name} is missing; give a directory that has it")
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            matrices = load_file(tensors_path)
        except (ValueError, OSError, SafetensorError) as error:
            raise InputError(f"rotations at '{name}' are damaged ({error}); save them again") from error
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise InputError(f"rotations at '{name}' are not of format {_FORMAT}; save them with this version")
        try:
            kind, weights = config["model_type"], config["model_fingerprint"]
        except KeyError as error:
            raise InputError(f"rotations at '{name}' are damaged (no {error}); save them again") from error
        rotations = cls(matrices, model_type=kind, model_fingerprint=weights, base_model=config.get("base_model"))
        rotations._what = f"the rotations at '{name}'"
        return rotations

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload rotations",
    ) -> str:
        """Upload the directory and a short model card to a model repository, which is made if need be.

        Args:
            repo_id: owner/name.
            private: of a new repository; None takes the owner's default.
            revision: branch, `main` if left out.
            token: of the hub; None takes the one that is logged in.
            commit_message: of the upload.

        Returns:
            Address of the commit.

        Raises:
            InputError: the hub refuses or cannot be reached.
        """
        mend = "check the name (owner/name), the network and `hf auth login`"
        with tempfile.TemporaryDirectory() as scratch, explained(f"cannot upload to '{repo_id}'", mend):
            directory = Path(scratch) / "rotations"
            self.save_pretrained(directory)
            write_text(self._card(repo_id), directory / "README.md")
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
            )
            return done.commit_url

    def _card(self, repo_id: str) -> str:
        known = self.base_model if "/" in (self.base_model or "") else None  # the hub takes nothing else as a name
        matter = ModelCardData(library_name="rotpruner", tags=["rotpruner", "pruning"], base_model=known)
        kinds = {True: "orthogonal matrices (sites, blocks, n, n)", False: "orders of features (layers, n)"}
        spaces = "".join(f"\n* `{space}`: {kinds[turns(space)]}, {tuple(Q.shape)}" for space, Q in self.items())
        title = f"# Rotations of {self.base_model or f'a {self.model_type} model'}"
        call = f'rotpruner.Rotations.from_pretrained("{repo_id}").merge(model)'
        return f"---\n{matter.to_yaml()}\n---\n\n{title}\n{spaces}\n\n```python\n{call}\n```\n"

    def check_config(self, model_config: Any) -> None:
        """Raise `InputError` unless these are rotations of such a model: its type, its spaces, its shapes."""
        if self.model_type != model_config.model_type:
            raise InputError(
                f"{self._what} were learned on another model, a {self.model_type}; "
                "give the model that they were learned on"
            )
        for space, Q in self.items():
            try:
                check_rotation(model_config, space, Q)
            except InputError as error:
                raise InputError(f"{self._what} do not fit: {error}") from None

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless these are rotations of this very model, in its own basis.

        That is told by its embedding: heads that were rotated already leave no trace there.
        """
        self.check_config(model.config)
        if self.model_fingerprint != fingerprint(model):
            raise InputError(
                f"{self._what} were learned on another model of the same type, or this one is rotated already"
                f"{', or rounded to float16' if model.dtype == torch.float16 else ''}; "
                "give the model that they were learned on"
            )

    def merge(self, model: nn.Module) -> None:
        """Move the model that they belong to into the rotated basis, in place; it computes the same function.

        Norms are folded, and a tied head untied, if the residual stream rotates.

        Raises:
            InputError: they are not rotations of this model; it is as it was.
        """
        self.check_model(model)
        merge_rotations(model, {space: Q.to(_device(model)) for space, Q in self.items()})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _local_or_downloaded(name: str | Path, revision: str | None, token: str | bool | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or path.is_absolute() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return path
    failure = f"no rotations at '{name}': it is not a directory, and the hub gives none of that name"
    with explained(failure, "check the path or name, the network and `hf auth login`"):
        files = ["rotation_config.json", "rotations.safetensors"]
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))

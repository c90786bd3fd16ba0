"""Which code made a result, and where."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with `-dirty` if it was changed; None outside of one."""
    here = Path(__file__)
    try:
        # A package installed into somebody else's checkout is not of that checkout.
        _git("ls-files", "--error-unmatch", here.name, cwd=here.parent)
        return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*", cwd=here.parent)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: torch.device) -> str:
    """`cpu`, or the device and the name of its GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def public_command(words: Sequence[str]) -> str:
    """A command line as another machine would give it: paths out of this checkout by their last part, in lists too."""
    local = re.compile(r"(?<![\w.])(?:\.{0,2}|~)/[^\s,\]]*")

    def public(word: str) -> str:
        if word.startswith(("/", "./", "../", "~/")) and "," not in word:
            return Path(word).name  # whole, spaces and all
        return local.sub(lambda path: Path(path[0]).name, word)

    return shlex.join(map(public, words))


def versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers depend on."""
    from rotpruner import __version__

    return {"rotpruner": __version__, **{name: version(name) for name in ("torch", "transformers")}}

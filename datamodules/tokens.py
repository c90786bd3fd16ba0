"""Text → cached token tensor.

Shapes: N sequences, T tokens each (`seq_len`).
"""

import hashlib
import json
import os
from array import array
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.texts import hub_text, pieces, stream, text_identity
from rotpruner.embedded import cache_directory, locked
from rotpruner.errors import InputError

_FORMAT = 1  # of the cached tensor: raise it whenever the same arguments would give other tokens


def calibration_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    seq_len: int,
    seed: int,
    tokenizer_name: str,
) -> Tensor:
    """Windows of the text's tokens, (N, T) int64, from the cache if they are there.

    The documents are joined with blank lines, tokenised without special tokens and cut into windows that do
    not overlap. Which windows: the start of a seeded permutation of all of them; for a streamed hub data set,
    whose documents come shuffled by the seed, the first ones. `tokenizer_name` stands for the tokenizer in
    the cache's key only if it has no backend to hash. Too short a text raises InputError.
    """
    check_sizes(num_sequences, seq_len, seed)
    key = {
        "format": _FORMAT,
        "text": text_identity(source),
        "tokenizer": _tokenizer_identity(tokenizer, tokenizer_name),
        "num_sequences": num_sequences,
        "seq_len": seq_len,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_directory() / "calibration" / f"{digest}.safetensors"
    shape, vocabulary = (num_sequences, seq_len), 1 + max(tokenizer.get_vocab().values())
    tokens = _load(path, shape, vocabulary)
    if tokens is None:
        with locked(path):
            tokens = _load(path, shape, vocabulary)  # somebody else may have built it while we waited
            if tokens is None:
                spool = path.with_suffix(".spool")  # we hold the lock: no other writer has it open
                try:
                    tokens = _windows(source, tokenizer, shape, seed, spool)
                finally:
                    spool.unlink(missing_ok=True)
                assert 0 <= tokens.min() <= tokens.max() < vocabulary
                _save(tokens, path)
    return tokens


def check_sizes(num_sequences: int, seq_len: int, seed: int) -> None:
    """Raise `InputError` if no calibration set has such sizes."""
    bounds = {"num_sequences": (num_sequences, 1), "seq_len": (seq_len, 2), "seed": (seed, 0)}
    for name, (value, bound) in bounds.items():
        if value < bound:
            raise InputError(f"{name} {value} is too small: pass {bound} or more")


def _windows(source: str, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int], seed: int, spool: Path) -> Tensor:
    """The chosen windows. All tokens of the text wait in the file `spool`, for the memory of one piece of it."""
    num_sequences, seq_len = shape
    hub = hub_text(source)
    streamed = hub is not None and not hub.whole
    count = 0
    with spool.open("wb") as file:
        for piece in pieces(stream(source, split="calibration", seed=seed)):
            ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
            array("i", ids).tofile(file)  # int32
            count += len(ids)
            if streamed and count >= num_sequences * seq_len:
                break
    total = count // seq_len
    if total < num_sequences:
        wanted = f"{num_sequences} are wanted: pass a longer text, a smaller seq_len or fewer num_sequences"
        raise InputError(f"text {source!r} holds {total} windows of {seq_len} tokens, {wanted}")
    windows = torch.from_file(str(spool), size=total * seq_len, dtype=torch.int32).view(total, seq_len)  # mapped
    order = torch.arange(total) if streamed else torch.randperm(total, generator=generator_of("windows", seed))
    return windows[order[:num_sequences]].long()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return name if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()


def generator_of(*parts: object) -> torch.Generator:
    """A generator of its own for each tuple of parts, whatever the global random state is."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _save(tokens: Tensor, path: Path) -> None:
    scratch = path.with_suffix(".tmp")  # we hold the lock: no other writer has it open
    save_file({"tokens": tokens}, scratch, metadata={"sha256": _digest(tokens)})
    os.replace(scratch, path)


def _load(path: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """The cached tensor, or None if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, metadata = file.get_tensor("tokens"), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    sound = tokens.dtype == torch.int64 and tokens.shape == shape
    sound = sound and metadata.get("sha256") == _digest(tokens)
    return tokens if sound and 0 <= tokens.min() <= tokens.max() < vocabulary else None

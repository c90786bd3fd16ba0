"""Text → cached token tensor.

Shapes: N sequences, T tokens each (`seq_len`).
"""

import hashlib
from array import array
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.texts import hub_text, pieces, stream, text_identity
from rotpruner.batches import chosen_windows
from rotpruner.cache import cache_path, load_tensors, locked, save_tensors
from rotpruner.errors import InputError

_FORMAT = 2  # of the cached tensor: raise it whenever the same arguments would give other tokens


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
    path = cache_path("calibration", key)
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
                save_tensors({"tokens": tokens}, path)
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
    return (windows[:num_sequences] if streamed else chosen_windows(windows, num_sequences, seed)).long()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return name if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()


def _load(path: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """The cached tensor, or None if it is absent or damaged."""
    tokens = (load_tensors(path) or {}).get("tokens")
    if tokens is None or tokens.dtype != torch.int64 or tokens.shape != shape:
        return None
    return tokens if 0 <= tokens.min() <= tokens.max() < vocabulary else None

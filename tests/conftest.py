"""Fixtures shared by the tests: a tiny model in Hugging Face form, a text that it can tokenise, commands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import plain_terminal  # noqa: F401
import pytest
import torch
from command_line import fit_arguments
from hypothesis import settings
from tiny_models import byte_bpe
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.__main__ import main
from rotpruner import embedded
from rotpruner.cache import cache_directory

settings.register_profile("here", deadline=None, derandomize=True)  # the machine may be slow
settings.load_profile("here")

WORDS = [
    "the",
    "model",
    "learns",
    "a",
    "basis",
    "in",
    "which",
    "small",
    "weights",
    "can",
    "be",
    "removed",
    "without",
    "much",
    "harm",
    "to",
    "what",
    "it",
    "says",
]


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """A random LLaMA of two blocks with random norm gains, in evaluation mode."""
    config = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    """Three sequences of 24 tokens of `tiny_llama`."""
    return torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(1))


def sample_text(words: int, seed: int = 0) -> str:
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe(sample_text(2000), 320)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(tie_word_embeddings=True).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(sample_text(6000, seed=1))
    return path


@pytest.fixture(scope="session")
def test_text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "other_words.txt"
    path.write_text(sample_text(2000, seed=2))
    return path


@pytest.fixture
def parallel_config(tmp_path, model_directory, text_file, test_text_file) -> Path:
    """A run of ten steps on two ranks of nine sequences, which they cannot share evenly."""
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model:
  model: {model_directory}
  base_dtype: float64
  optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.01}}}}
data: {{calibration: {text_file}, num_sequences: 9, seq_len: 32, batch_size: 2}}
trainer:
  max_steps: 10
  accelerator: cpu
  devices: 2
  strategy: ddp
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: callbacks.repruning.Repruning, init_args: {{every_n_steps: 3}}}}
    - {{class_path: callbacks.rotation_checkpoint.RotationCheckpoint, init_args: {{every_n_steps: 4}}}}
    - class_path: callbacks.perplexity.Perplexity
      init_args: {{texts: [{test_text_file}], every_n_steps: 5, seq_len: 32, max_tokens: 160}}
""")
    return path


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    """A cache of these tests, so that none finds what an earlier version has left; it shares the embedded texts."""
    directory = tmp_path_factory.getbasetemp() / "cache"
    directory.mkdir()
    _share(directory, "texts")
    return directory


def _share(directory: Path, part: str) -> None:
    theirs = cache_directory() / part
    if theirs.is_dir() and theirs.parent != directory and not (directory / part).exists():
        (directory / part).symlink_to(theirs)


@pytest.fixture(autouse=True)
def _alone(session_cache, monkeypatch, request):
    """On the CPU, whose figures are compared, and with a cache of the session's own.

    Tiny models run on one thread, many times faster than on two.
    """
    threads = torch.get_num_threads()
    torch.manual_seed(0)  # whatever tests came before in this process
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "slow" in request.keywords:
        embedded.model_directory("smollm2-135m")  # once, for all sessions
        _share(session_cache, "models")
    else:
        torch.set_num_threads(1)
    monkeypatch.setenv("ROTPRUNER_CACHE", str(session_cache))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, which does not exist yet."""
    monkeypatch.setenv("ROTPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prune(model_directory, text_file, tmp_path):
    """`prune(**changes)` → (status, output directory), from arguments that work."""

    def run(**changes) -> tuple[int, Path]:
        options = dict(
            model=model_directory,
            pruner="wanda",
            pattern="2:4",
            calibration=text_file,
            num_sequences=4,
            seq_len=32,
            seed=0,
            output=tmp_path / "pruned",
        )
        options.update(changes)
        arguments = [item for key, value in options.items() for item in (f"--{key}", str(value))]
        return main(["prune", *arguments, "--json"]), Path(options["output"])

    return run


@pytest.fixture
def fit(model_directory, text_file, test_text_file, tmp_path):
    """`fit(*changes)` → (status, run directory), from the quickstart with tiny overrides."""

    def run(
        *changes: str, configs: Sequence[Path] = (Path("experiments/configs/quickstart.yaml"),)
    ) -> tuple[int, Path]:
        directory = tmp_path / "run"
        given = fit_arguments(model_directory, text_file, test_text_file, directory)
        files = [item for config in configs for item in ("-c", str(config))]
        return main(["fit", *files, *given, *changes]), directory

    return run


@pytest.fixture
def texts() -> list[str]:
    """Documents to calibrate on from Python."""
    return [sample_text(400, seed) for seed in range(4)]

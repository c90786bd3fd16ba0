"""The command line: `python -m experiments COMMAND …`."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from rotpruner.errors import InputError

#: Modules to import before a command runs: those that call `register_family`, for instance.
PLUGINS = "ROTPRUNER_PLUGINS"

#: What each command can do where the device's memory is full.
_SAVINGS = {
    "fit": "--model.gradient_checkpointing true, --model.offload true (see plan), or --trainer.accelerator cpu",
    "recover": "--model.gradient_checkpointing true, or --trainer.accelerator cpu; a decoder weight takes 16 bytes "
    "beside the teacher all the same: itself, its gradient, and two states of Adam",
    "evaluate": "--dtype bfloat16, or --device cpu",
}

#: Command → (module with a `main(arguments)`, what it does).
COMMANDS = {
    "fit": ("experiments.fit", "learn rotations, prune, export and compare: fit -c CONFIG.yaml"),
    "recover": (
        "experiments.recover",
        "train the weights that survived pruning: recover -c CONFIG.yaml --model.model RUN/export",
    ),
    "prune": ("experiments.prune", "prune a model once, in its own basis or a rotated one"),
    "sweep": ("experiments.sweep", "run every row of a table: sweep experiments/sweeps/pruners.yaml --results DIR"),
    "results": ("experiments.results", "write experiments/RESULTS.md from what sweeps have kept"),
    "benchmark": (
        "experiments.benchmark",
        "benchmark step: time of a step of learning; benchmark inference: of models",
    ),
    "pack": ("experiments.pack", "store a pruned model compactly: its kept values and one mask bit per weight"),
    "unpack": ("experiments.unpack", "restore the ordinary checkpoint of a packed model"),
    "evaluate": ("experiments.evaluate", "perplexity of a model on texts, accuracy on tasks"),
    "plan": ("experiments.plan", "what a fit would take: memory by part, arithmetic, disk; from its config alone"),
    "report": ("experiments.report", "one HTML page and SVG plots about finished runs"),
}


def main(arguments: list[str]) -> int:
    """Run one command; 0 if it went well, 2 after one line on standard error if the input cannot be used."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: python -m experiments COMMAND [options]\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:10} {purpose}")
        print("\n`python -m experiments COMMAND --help` lists a command's options.")
        return 0
    try:
        if not arguments or arguments[0] not in COMMANDS:
            given = f"unknown command '{arguments[0]}'" if arguments else "no command given"
            raise InputError(f"{given}; choose one of {', '.join(COMMANDS)}")
        # Rotations stay orthogonal, and errors comparable, in true float32; environments may have set TF32.
        torch.set_float32_matmul_precision("highest")
        # A quiet terminal: transformers draws a bar of its own for every file that it opens.
        transformers_logging.disable_progress_bar()
        _import_plugins()
        module, _ = COMMANDS[arguments[0]]
        import_module(module).main(arguments[1:])
    except InputError as error:
        return _refuse(str(error))
    except torch.OutOfMemoryError as error:
        error.add_note(f"To take less of the device's memory: {_SAVINGS.get(arguments[0], '--device cpu')}.")
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # Three libraries write files, each with its own way to say this.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        return _refuse("the disk is full; free some space and run again (finished files are intact)")
    return 0


def _import_plugins() -> None:
    """Import the modules that $ROTPRUNER_PLUGINS names, with commas between: those that register a family, say.

    Raises:
        InputError: one cannot be imported.
    """
    for name in filter(None, os.environ.get(PLUGINS, "").replace(" ", "").split(",")):
        try:
            import_module(name)
        except ImportError as error:
            raise InputError(f"${PLUGINS} names '{name}', which cannot be imported: {error}") from None


def _refuse(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

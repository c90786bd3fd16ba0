"""Fits in processes of their own: one or several ranks on gloo, to their end or to their death."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import wandb
from lightning import Callback
from safetensors.torch import load_file, save_file
from tiny_models import exact as in_float64
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotpruner.distributed import Ranks
from rotpruner.errors import InputError
from rotpruner.measures import pattern_of, sparsity_of
from rotpruner.pruners import Pruner

# Children are forked from a server that has imported everything and computed nothing: starting one is cheap.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["experiments.fit"])


class Drawing(Pruner):
    """Draws its masks from the CPU's random state."""

    needs = "nothing"

    def saliency(self, weight, moment):
        return torch.rand(weight.shape)


class SignalAt(Callback):
    """Send this very process a signal in one hook of one step."""

    def __init__(self, step: int, hook: str, signum: int = signal.SIGKILL) -> None:
        self.step, self.hook, self.signum = step, hook, signum

    def setup(self, trainer, pl_module, stage):
        setattr(self, self.hook, self._send)

    def _send(self, trainer, *_, **__):
        if trainer.global_step >= self.step:
            os.kill(os.getpid(), self.signum)


class DieOnce(Callback):
    """SIGKILL the second rank in a step, the first time that the step comes: for config files."""

    def __init__(self, step: int, mark: str) -> None:
        self.step, self.mark = step, Path(mark)

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Record(Callback):
    """Write every rank's rotations and masks at the end of training."""

    def on_train_end(self, trainer, pl_module):
        rotated = pl_module.rotated
        found = {f"rotation {space}": Q.detach().clone() for space, Q in rotated.rotations().items()}
        found |= {f"mask {linear.place.name}": linear.mask for linear in rotated.linears}
        run = Path(trainer.default_root_dir)
        save_file(found, run / f"rank-{trainer.global_rank}.safetensors")
        weights = [linear.weight for linear in rotated.linears]
        held = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
        (run / f"held-{trainer.global_rank}").write_text(str(held / sum(w.numel() for w in weights)))
        # What DDP sends from the first rank to the others at every step.
        sent = [
            name for name, buffer in pl_module.named_buffers() if any(buffer is of for of in _synchronised(trainer))
        ]
        (run / f"sent-{trainer.global_rank}").write_text(" ".join(sent))


def _synchronised(trainer) -> list[torch.Tensor]:
    return getattr(trainer.model, "modules_buffers", [])


def recorded(run: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run / f"rank-{rank}.safetensors")


def fit(arguments: list[str], callbacks=(), exact: bool = False, environment=None) -> None:
    """One process's share: build the run and fit it. `exact` swaps in norms that compute in float64."""
    import lightning_modules.rotation_module as module
    from experiments.fit import FitCLI

    os.environ.update(environment or {})
    os.environ.pop("WANDB_SERVICE", None)  # an earlier test's, which takes killed runs for living ones
    torch.set_num_threads(1)
    if exact:
        load = module.load_model
        module.load_model = lambda *given, **more: in_float64(load(*given, **more))
    cli = FitCLI(arguments)
    cli.trainer.callbacks.extend([Record(), *callbacks])
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    wandb.finish()  # such processes leave without the exit handler that would do this


def command(arguments: list[str], environment=None) -> None:
    """The command line itself, in a process that has no terminal to print to."""
    from experiments.__main__ import main

    os.environ.update(environment or {})
    raise SystemExit(main(arguments))


def fail_at_the_end(arguments: list[str], environment) -> None:
    """One of two ranks: the first fails in work of its own, while the second waits and says so by status 40."""
    os.environ.update(environment)
    where = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=where, rank=int(environment["LOCAL_RANK"]), world_size=2)
    try:
        with Ranks.world().waiting():
            if Ranks.world().rank == 0:
                raise InputError("the disk is full")
    except SystemExit as ended:
        raise SystemExit(40 + ended.code) from None


def start(arguments: list[str], *callbacks: Callback, **settings) -> int:
    """Fit in one process; its exit status."""
    return _join([_process(fit, arguments, callbacks, environment=_cache(), **settings)])[0]


def start_ranks(
    arguments: list[str], *callbacks: Callback | None, target=fit, ranks: int = 2, meanwhile=None, **settings
) -> list[int]:
    """Fit in several processes, the n-th callback on rank n only; their exit statuses.

    `meanwhile` is called with the running processes.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(ranks):
        # As torchrun does: Lightning then starts no processes of its own.
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        environment |= _cache()
        own = [callback for callback in callbacks[rank : rank + 1] if callback is not None]
        given = (arguments, own) if target is fit else (arguments,)
        processes.append(_process(target, *given, environment=environment, **settings))
    if meanwhile is not None:
        meanwhile(processes)
    return _join(processes)


def _cache() -> dict[str, str]:
    """Where this test's cache is: the server that forks processes has the environment of when it was started."""
    return {"ROTPRUNER_CACHE": os.environ["ROTPRUNER_CACHE"]}


def _process(target, *given, **settings):
    process = PROCESSES.Process(target=target, args=given, kwargs=settings, daemon=True)
    process.start()
    return process


def _join(processes) -> list[int]:
    for process in processes:
        process.join(300)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, "the fit hangs"
    return [process.exitcode for process in processes]


# -- what parallel runs are given, and what they must give ---------------------------------------------


def alone(config: Path, run: Path) -> list[str]:
    """The same run in one process: the same global batches."""
    place = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "4"]
    return ["-c", str(config), "--trainer.default_root_dir", str(run), *place]


def together(config: Path, run: Path) -> list[str]:
    return ["-c", str(config), "--trainer.default_root_dir", str(run)]


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tensor.dtype in (torch.bool, torch.int64):
            assert torch.equal(found[name], tensor), name
            assert tensor.dtype == torch.bool or (tensor.diff() != 1).any(), "no order was chosen"
        else:
            assert (found[name] - tensor).abs().max() <= tolerance, name
            assert (tensor - torch.eye(tensor.shape[-1])).abs().max() > 0.01, "nothing was learned"


def finishing(config: Path, test_text_file: Path, steps: int, run: Path) -> list[str]:
    """A config file that says all: two processes, where the run lives and how it ends."""
    text = config.read_text().replace("max_steps: 10", f"max_steps: {steps}\n  default_root_dir: {run}")
    finish = f"init_args: {{texts: [{test_text_file}], seq_len: 32, max_tokens: 256}}"
    text += f"    - class_path: callbacks.finish.Finish\n      {finish}\n"
    path = config.with_name("all.yaml")
    path.write_text(text.replace("float64", "float32"))
    return ["fit", "-c", str(path)]


def assert_finished(run: Path) -> None:
    rows = [row["name"] for row in json.loads((run / "results.json").read_text())["rows"]]
    assert rows == ["dense", "pruner", "random_rotation", "rotpruner"]
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert sparsity_of(exported) == 0.5
    assert pattern_of(exported) == "2:4"
    assert AutoTokenizer.from_pretrained(run / "export")

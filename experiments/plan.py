"""`python -m experiments plan`: what a fit would take, from its config alone; no weights are loaded.

Every option of `fit` can be given here too, in the same words: `plan -c CONFIG --model.base_dtype float32`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import torch

from experiments.arguments import Parser, at_least
from experiments.arguments import report as print_json
from experiments.gpus import GIB, GIGA, GPUS, TERA, dtype_on
from experiments.plan_setup import read_setup
from experiments.planning.costs import disk_space, step_flops
from experiments.planning.memory import largest, memory_plan
from experiments.planning.sizes import Setup, Term, total
from rotpruner.precision import DtypeName

_EFFICIENCY = 0.4  # of the peak rate that large models usually reach in training; an assumption


def main(arguments: list[str]) -> None:
    """Print the plan; with `--json` one object of parameters, memory, flops, time, disk and changes that would help.

    What a second fit takes stands in `second_fit`, of the same form.
    """
    parser = Parser("plan", "What a fit would take: memory by part, arithmetic, disk. Other options are those of fit.")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu"], default="h100-80gb", help="where; cpu is this machine")
    parser.add_argument("--count", type=at_least(1), help="GPUs; the config's trainer.devices if left out")
    options, rest = parser.parse_known_args(arguments)
    setup, model = read_setup(rest, options.gpu, options.count)
    capacity = _capacity(options.gpu, setup.ranks)
    fits = _peak(setup) <= capacity
    result = {
        "model": model.model,
        "parameters": setup.parameters,
        "trainable_parameters": setup.trainable,
        "hardware": {"name": options.gpu, "count": setup.ranks, "bytes": capacity, "sharded": setup.sharded},
        **_reckoned(setup, options.gpu),
        "second_fit": setup.second and _reckoned(setup.second, options.gpu),
        "disk": _terms(disk_space(setup)),
        "fits": fits,
        "changes": [] if fits else _changes(setup, model.base_dtype, options.gpu, capacity),
    }
    if options.json:
        print_json(result, True)
    else:
        _show(result, setup)


def _peak(setup: Setup) -> int:
    """Of the fit, and of the one after its update."""
    return max(memory_plan(fit).peak for fit in (setup, setup.second) if fit is not None)


def _reckoned(setup: Setup, gpu: str) -> dict[str, Any]:
    """What one fit takes."""
    memory, flops = memory_plan(setup), step_flops(setup)
    seconds, rates = _seconds(flops, setup, gpu)
    return {
        "steps": setup.steps,
        "memory": {
            "peak": memory.peak,
            "learning": memory.learning,
            "host": memory.host,
            "resident": _terms(memory.resident),
            "phases": {name: _terms(terms) for name, terms in memory.phases.items()},
            "kept_by_host": _terms(memory.kept_by_host),
            "host_phases": {name: _terms(terms) for name, terms in memory.host_phases.items()},
        },
        "flops": _terms(flops),
        "seconds_per_step": seconds,
        "seconds_formula": rates,
    }


def _capacity(gpu: str, ranks: int) -> int:
    """Bytes of each of the GPUs; of this machine's memory each process's share."""
    if gpu == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return int(GPUS[gpu].memory)


def _seconds(flops: list[Term], setup: Setup, gpu: str) -> tuple[float | None, str]:
    """Of a step, and their formula; None for a CPU, whose rates are not known."""
    if gpu == "cpu":
        return None, ""
    rates = GPUS[gpu]
    rate = rates.half if setup.s < 4 else rates.single
    turning = sum(term.amount for term in flops if term.name == "orthogonal map")
    rest = total(flops) - turning
    parts = [f"{work / TERA:.2f} / {peak / TERA:g}" for work, peak in ((rest, rate), (turning, rates.single))]
    seconds, formula = (rest / rate + turning / rates.single) / _EFFICIENCY, f"({' + '.join(parts)}) / {_EFFICIENCY}"
    if setup.fetches:
        # Forward and in the recomputation. A copy waits for the work before it, as they share a stream.
        copied = 2 * setup.decoder_weights * setup.s
        seconds += copied / rates.link
        formula += f" + {copied / GIGA:.2f} / {rates.link / GIGA:g}"
    return seconds, formula


def _terms(terms: list[Term]) -> list[dict[str, Any]]:
    return [asdict(term) for term in terms]


def _changes(setup: Setup, asked: DtypeName, gpu: str, capacity: int) -> list[dict[str, Any]]:
    """What would lower the peak: each change alone, all together, then other hardware; and whether it is enough.

    Another GPU may find another dtype where `auto` was `asked` for.
    """
    found: list[dict[str, Any]] = []

    def weigh(change: str, changed: Setup, room: int) -> bool:
        peak = _peak(changed)
        found.append({"change": change, "peak": peak, "fits": peak <= room})
        return peak <= room

    together, names = setup, dict[str, None]()
    for changes, settings, useful in _savings(setup):
        if useful:
            weigh(" ".join(changes), replace(setup, **settings), capacity)
            together, names = replace(together, **settings), names | dict.fromkeys(changes)
    if len(found) > 1:
        weigh(" ".join(names), together, capacity)
    if gpu == "cpu":
        return found
    for name, hardware in GPUS.items():
        if hardware.memory >= capacity and name != gpu:
            weigh(f"--gpu {name}", replace(setup, dtype=dtype_on(asked, name)), int(hardware.memory))
    if setup.second_steps or setup.second_teacher:  # which do not go with shards
        return found
    for name in [gpu, *(other for other in GPUS if GPUS[other].memory > capacity)]:
        for ranks in (2, 4, 8, 16, 32):
            shared = replace(setup, dtype=dtype_on(asked, name), ranks=ranks, sharded=True, offload=False)
            if _peak(shared) <= GPUS[name].memory or ranks == 32:
                change = f"--gpu {name} --count {ranks}, and a ModelParallelStrategy"
                weigh(change + " without offload" * setup.offload, shared, int(GPUS[name].memory))
                break
    return found


def _savings(setup: Setup) -> list[tuple[list[str], dict[str, Any], bool]]:
    """Options of `fit`, what they change, and whether that can help here."""
    half, needed = setup.seq_len // 2, setup.sliced or setup.start == "pca" or setup.placement not in ("shared", 1)
    recompute = [] if setup.gradient_checkpointing else ["--model.gradient_checkpointing true"]
    recomputed = {"gradient_checkpointing": True}
    waits = setup.device == "gpu" and not setup.sharded and not setup.offload
    return [
        (["--model.base_dtype bfloat16"], {"dtype": torch.bfloat16}, setup.s > 2),
        (recompute, recomputed, bool(recompute)),
        ([*recompute, "--model.offload true"], {**recomputed, "offload": True}, waits),
        (["--data.batch_size 1"], {"batch_size": 1}, setup.batch_size > 1),
        ([f"--data.seq_len {half}"], {"seq_len": half}, half >= 512),
        (["--second_fit null"], {"second_steps": 0}, setup.second_steps > 0),
        (["--model.spaces [value_heads]"], {"spaces": ("value_heads",)}, "residual" in setup.spaces and not needed),
    ]


def _show(result: dict[str, Any], setup: Setup) -> None:
    """For a person, on standard output."""
    memory, hardware = memory_plan(setup), result["hardware"]
    worst = largest(memory.phases)
    where = f"{hardware['count']} × {hardware['name']}" + ", weights sharded" * hardware["sharded"]
    print(f"{result['model']}: {setup.parameters:,} parameters, {setup.trainable:,} of rotations learn\n")
    print(*setup.legend(), sep="\n")
    _table(f"resident, on each of {where}", memory.resident)
    _table(f"largest phase: {worst}", memory.phases[worst])
    others = [f"{name} {total(terms) / GIB:.2f} GiB" for name, terms in memory.phases.items() if name != worst]
    print("other phases:", ", ".join(others))
    if memory.kept_by_host:
        _table("kept by the host", memory.kept_by_host)
    for name, terms in memory.host_phases.items():
        _table(f"on the host: {name}", terms)
    _table("operations of a step", [Term(**term) for term in result["flops"]], TERA, "TFLOP")
    _table("disk", [Term(**term) for term in result["disk"]])
    if (seconds := result["seconds_per_step"]) is not None:
        print(f"\ntime: {result['seconds_formula']} = {seconds:.2f} s a step: TFLOP by peak TFLOP/s,")
        print("the orthogonal map in single precision,")
        if setup.fetches:
            print("and GB copied from the host, forward and again backward, by the link's peak GB/s; products")
        print(f"at {_EFFICIENCY:.0%} of the peak (assumed); {setup.steps} steps take {seconds * setup.steps / 60:.0f} "
              "minutes, without calibration, mask refreshes and the end of the run")  # fmt: skip
    verdict = "fits" if result["fits"] else "DOES NOT FIT; what would change that:"
    if hardware["name"] == "cpu":
        print(f"\npeak of learning: {memory.learning / GIB:.2f} GiB, above what imports take")
    else:
        dearest = largest(memory.host_phases)
        print(f"\nmain memory besides: {memory.host / GIB:.2f} GiB at its peak, {dearest};")
        print("less if the model, its copies and its states fit into half of what the GPU has free at the end")
    if (second := result["second_fit"]) is not None:
        peak, host = (second["memory"][name] / GIB for name in ("peak", "host"))
        beside = "" if hardware["name"] == "cpu" else f", {host:.2f} GiB of main memory besides"
        minutes = "" if seconds is None else f", {second['seconds_per_step'] * second['steps'] / 60:.0f} minutes"
        print(f"\nsecond fit, after the update: {second['steps']} steps, peak {peak:.2f} GiB{beside}{minutes}")
    print(f"\npeak {_peak(setup) / GIB:.2f} GiB of {hardware['bytes'] / GIB:.0f} GiB: {verdict}")
    for change in result["changes"]:
        print(f"  {change['peak'] / GIB:8.2f} GiB {'fits' if change['fits'] else 'too large':10} {change['change']}")


def _table(title: str, terms: list[Term], unit: float = GIB, name: str = "GiB") -> None:
    print(f"\n{title}: {total(terms) / unit:.2f} {name}")
    for term in terms:
        print(f"  {term.amount / unit:9.3f}  {term.name:32} {term.formula}")

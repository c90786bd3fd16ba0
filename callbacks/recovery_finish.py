"""The end of a recovery: export the model, evaluate it, and the model that it was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from callbacks.ending import Ending
from rotpruner.artifacts import save_model
from rotpruner.loading import load_config, load_model, load_tokenizer
from rotpruner.measures import pattern_of
from rotpruner.model_card import Origin, write_card


class RecoveryFinish(Ending):
    """After the last step, write `export/` and `results.json` into the run directory.

    ```yaml
    trainer:
      callbacks:
        - class_path: callbacks.recovery_finish.RecoveryFinish
          init_args: {texts: [wikipedia_test], max_tokens: 16384}
    ```

    Its rows: `dense`, the teacher; `pruned`, the model before; `recovered`. All are evaluated in float32, the last one
    as it was saved and loaded again. `export/README.md` is a model card with all rows.

    Args:
        texts: names or paths of test texts, none of which trained or calibrated anything.
        seq_len: tokens per window.
        max_tokens: the first tokens of each text that are used; None takes all.
    """

    def __init__(
        self,
        texts: list[str] = ["wikipedia_test"],  # noqa: B006 - read by the command line, never changed
        seq_len: int = 1024,
        max_tokens: int | None = 16384,
    ) -> None:
        super().__init__(texts, seq_len, max_tokens)

    def finish(self, run: Path, trainer: Trainer, module: Any, seconds: float) -> None:
        """Export what was learned and compare it with both models that it came from."""
        # It has learned in float32, and goes back to the bits that it came in; zeros stay zero.
        recovered = module.recovery.pruned.to(load_config(module.model_name).dtype or torch.float32)
        save_model(recovered, load_tokenizer(module.model_name), run / "export", replace=True)
        pattern = pattern_of(module.recovery.pruned)
        sources = {"dense": module.teacher, "pruned": module.model_name, "recovered": str(run / "export")}
        rows = []
        for name, source in sources.items():
            model, given = load_model(source, torch.float32), name != "recovered"
            kept = None if name == "dense" else pattern
            rows.append(self.evaluated(name, kept, model, 0.0 if given else seconds, reference=given))
        origin = Origin(
            base_model=module.teacher,
            pattern=pattern,
            basis="recovery",
            pruned=module.model_name,
            num_sequences=trainer.datamodule.num_sequences,  # type: ignore[attr-defined]
            seed=module.seed,
            rows=rows,
            command="python -m experiments recover -c config.yaml" if self.config else None,
            **self.described(trainer),
        )
        write_card(run / "export", origin, load_config(module.teacher), self._commit)
        self.record(run, rows, trainer)

"""What stands in the results of the first of two fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from callbacks.ending import Row
from rotpruner.artifacts import read_json
from rotpruner.errors import InputError


@dataclass(frozen=True)
class FirstFit:
    """What the first of two fits has left in its results.

    Attributes:
        directory: of its run.
        rows: of its controls, and of what it has made as `first_fit`.
        budget: its steps and training tokens, by those names.
        evaluation: how it was evaluated, in words.
        updated: whether its kept weights were fitted.
    """

    directory: Path
    rows: list[Row]
    budget: dict[str, int]
    evaluation: str
    updated: bool

    @classmethod
    def read(cls, directory: Path) -> FirstFit:
        """The results in a run directory.

        Raises:
            InputError: it holds no finished fit.
        """
        try:
            results = read_json(directory / "results.json")
            budget, rows = results["budget"], {row["name"]: row for row in results["rows"]}
            made = {**rows.pop("rotpruner"), "name": "first_fit"}
            others = [row for name, row in rows.items() if name not in ("dense", "first_fit")]
            updated = any("step_length" in row for row in results["rows"])
            for row in (made, *others):
                if row["name"] in ("no_update", "first_fit"):  # the others have learned nothing
                    row.setdefault("training_tokens", budget["training_tokens"])
            return cls(directory, [*others, made], budget, results["evaluation"], updated)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"first_fit '{directory}' holds no results of a fit ({error!r}); name the run directory of one that "
                "has ended"
            ) from error

    @property
    def seconds(self) -> float:
        """Spent on what it has made."""
        return self.rows[-1]["seconds"]

    def check_begins(self, init_weights: str | None) -> None:
        """Raise `InputError` if a fit begins with other weights than those that it has exported."""
        if init_weights is None or Path(init_weights).resolve() != (self.directory / "export").resolve():
            raise InputError(
                f"first_fit '{self.directory}' is not what this fit continues from: set model.init_weights to its "
                "export, or leave first_fit out"
            )

    def check_evaluated(self, texts: list[str], evaluation: str) -> None:
        """Raise `InputError` if it was evaluated otherwise."""
        known = list(self.rows[-1]["ppl"])
        if (known, self.evaluation) != (texts, evaluation):
            raise InputError(
                f"first_fit '{self.directory}' was evaluated on {', '.join(known)} ({self.evaluation}), and this fit "
                f"is to be on {', '.join(texts)} ({evaluation}); evaluate both alike, or leave first_fit out"
            )

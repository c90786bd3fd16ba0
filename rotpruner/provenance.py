"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with `-dirty` if it was changed; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()

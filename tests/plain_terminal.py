"""Imported before anything makes a console: what commands print is compared, wherever the tests run."""

import os

for _name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(_name, None)
os.environ |= {"TERM": "xterm", "COLUMNS": "200"}

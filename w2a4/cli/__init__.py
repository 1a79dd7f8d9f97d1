"""The command `w2a4`."""

import sys


def run() -> None:
    """The command; Ctrl-C is one line also while its modules are imported."""
    try:
        from .main import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

"""The command `w2a4` before its package is imported, which takes seconds: Ctrl-C is one line then too."""

import sys


def main() -> None:
    try:
        from w2a4.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

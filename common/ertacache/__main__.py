"""`python -m ertacache`: see cli.py."""

import sys

from ertacache.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Compare ERTACache with its rivals on Wan2.1: `sh reproduce.sh`."""

import sys

from generate import FOLDER, MODEL_FOLDER, load

from compare import reproduce
from ertacache.cli import command

if __name__ == "__main__":
    sys.exit(command.run(lambda: reproduce.main(FOLDER, load, MODEL_FOLDER)))

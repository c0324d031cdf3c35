"""`python -m shoestring.train ...` is `shoestring train ...`: the door that torchrun needs, and the only import of `launch` from here."""

import sys

from ..launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

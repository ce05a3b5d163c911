"""``python -m quicksilver_ext`` is the command ``quicksilver``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m dlnlab`, the same program as the console script `dlnlab`."""

import sys

from dlnlab.cli import main

if __name__ == "__main__":
    sys.exit(main())

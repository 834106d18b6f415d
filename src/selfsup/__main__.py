"""`python -m selfsup`, the same as `selfsup`."""

import sys

from selfsup.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m hubfs` is the `hubfs` command."""

import sys

from hubfs.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

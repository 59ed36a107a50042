"""`python -m openmythos`."""

import sys

from openmythos.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m saferule` is the command `saferule`."""
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m fastrms`: what is installed here, and whether it has the bits that it promises."""

import sys

from .self_check import main

if __name__ == "__main__":
    sys.exit(main())

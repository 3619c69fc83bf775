"""`python -m qncd`: the command `qncd`."""

import sys

from qncd.app.console import main

if __name__ == "__main__":
    sys.argv[0] = "qncd"  # what messages call the program
    main()

"""`mocohub extract` as a file; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["extract", *sys.argv[1:]]))

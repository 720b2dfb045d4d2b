"""`mocohub linear` as a file; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["linear", *sys.argv[1:]]))

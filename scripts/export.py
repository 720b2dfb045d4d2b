"""`mocohub export` as a file; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["export", *sys.argv[1:]]))

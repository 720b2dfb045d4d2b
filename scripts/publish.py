"""`mocohub publish` as a file; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["publish", *sys.argv[1:]]))

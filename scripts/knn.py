"""`mocohub knn` as a file; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["knn", *sys.argv[1:]]))

"""`mocohub linear` as a file that torchrun and SLURM can name; takes the same arguments."""

import sys

from mocohub.cli import main

sys.exit(main(["linear", *sys.argv[1:]]))

"""`python -m mocohub` is `mocohub`."""

import sys

from mocohub.cli import main

sys.exit(main())

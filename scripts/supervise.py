"""Keep `mocohub pretrain` running under torchrun: options of mocohub.pretrain.supervise, then its arguments.

python scripts/supervise.py --nproc-per-node 8 moco_r50_in1m --data train --out runs/v1
"""

import sys

from mocohub.pretrain.supervise import main

sys.exit(main())

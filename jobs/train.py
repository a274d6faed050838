"""One training run. Settings are Hydra overrides (key=value); `--dry-run` prints what would start.

python jobs/train.py                                                    one rank, every default
python jobs/train.py launcher.num_workers=2 norm=sync                   two ranks on this machine
torchrun --nproc-per-node 2 jobs/train.py data=mnist data.root=PATH     the same, ranks from torchrun
python jobs/train.py launcher=ray launcher.num_workers=2                two ranks from Ray
"""

import sys

from syncbn.cli.launching import main

if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))

"""One study: arms x seeds, statistics, figures, report. `--dry-run` prints what would start.

python jobs/compare.py study=demo                                       ranks on this machine
python jobs/compare.py study=demo launcher=ray                          ranks from Ray
python jobs/compare.py study=demo train.steps=100 'study.seeds=[0,1]'   a shorter one
"""

import sys

from syncbn.cli.launching import main

if __name__ == "__main__":
    sys.exit(main("compare", sys.argv[1:]))

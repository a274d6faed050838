"""Plants the mutant that `SYNCBN_MUTANT` names in every process of Python that has this folder in its `PYTHONPATH`."""

import os
import sys
import traceback
from pathlib import Path

if _what := os.environ.get("SYNCBN_MUTANT"):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        from mutants import MUTANTS
        from mutants.planting import plant

        plant(next(mutant for mutant in MUTANTS if mutant.what == _what))
    except Exception:  # Python itself would print it and go on without the mutant
        traceback.print_exc()
        os._exit(70)
    finally:
        del sys.path[0]

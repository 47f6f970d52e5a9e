"""`python benchmarks/simulated_endpoint` and `python -m simulated_endpoint`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __package__:
    from .program import main

    main()
else:
    # Started as a folder: it is a package of its own, whatever lies beside it.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("simulated_endpoint", run_name="__main__", alter_sys=True)

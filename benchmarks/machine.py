"""What a dated result says about where it was measured, without names and paths of the machine."""

import os
from typing import Any

from sage.runfolder import provenance


def machine() -> dict[str, Any]:
    """Facts about the machine and the program, with the load of other work: call it before measuring."""
    facts = {"num_cores": os.cpu_count(), "load_average_before": load_average()}
    found = provenance.environment(**facts)
    return {key: found[key] for key in ("started", "commit", "dirty", "versions", *facts)}


def load_average() -> float:
    """How many processes wanted a core, the mean of the last minute."""
    return os.getloadavg()[0]

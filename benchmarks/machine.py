"""What a dated result says of where it was measured, without the machine's names and paths."""

import os
from typing import Any

from sage.runfolder import provenance


def machine() -> dict[str, Any]:
    """To be asked before the measurement, for the load of other work."""
    facts = {"num_cores": os.cpu_count(), "load_average_before": load_average()}
    found = provenance.environment(**facts)
    return {key: found[key] for key in ("started", "commit", "dirty", "versions", *facts)}


def load_average() -> float:
    """Processes that wanted a core, the mean of the last minute."""
    return os.getloadavg()[0]

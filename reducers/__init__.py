"""Every reducer by its name in the configuration."""

from reducers.accordion import Accordion
from reducers.exact import Exact
from reducers.global_topk import GlobalTopK
from reducers.powersgd import PowerSGD
from reducers.sage import Sage
from reducers.threshold import HardThreshold
from reducers.topk import TopK
from sage.interfaces import Reducer

REDUCERS: dict[str, type[Reducer]] = {
    "exact": Exact,
    "topk": TopK,
    "global_topk": GlobalTopK,
    "threshold": HardThreshold,
    "sage": Sage,
    "powersgd": PowerSGD,
    "accordion": Accordion,
}
Accordion.inners = {"topk": TopK, "powersgd": PowerSGD}

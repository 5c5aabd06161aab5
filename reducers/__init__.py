"""Every reducer by its name in the configuration."""

from reducers.atomo import Atomo
from reducers.exact import Exact
from reducers.global_topk import GlobalTopK
from reducers.powersgd import PowerSGD
from reducers.random_k import RandomBlock, RandomK
from reducers.sage import Sage
from reducers.sign_norm import SignNorm
from reducers.signsgd import SignSGD
from reducers.signum import Signum
from reducers.svd import SVD
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
    "random_k": RandomK,
    "random_block": RandomBlock,
    "sign_norm": SignNorm,
    "signsgd": SignSGD,
    "signum": Signum,
    "svd": SVD,
    "atomo": Atomo,
}

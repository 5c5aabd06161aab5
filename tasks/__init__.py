"""Every task by its name in the configuration."""

from sage.interfaces import Task
from tasks.cifar import Cifar10, Cifar100
from tasks.digits import Digits
from tasks.movielens import MovieLens1M, MovieLens20M, MovieLens100K
from tasks.ptb import PennTreebank
from tasks.python_docs import PythonDocs
from tasks.synthetic_ratings import SyntheticRatings
from tasks.wikitext2 import WikiText2

TASKS: dict[str, type[Task]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "digits": Digits,
    "ml-100k": MovieLens100K,
    "ml-1m": MovieLens1M,
    "ml-20m": MovieLens20M,
    "ptb": PennTreebank,
    "python_docs": PythonDocs,
    "synthetic_ratings": SyntheticRatings,
    "wikitext2": WikiText2,
}

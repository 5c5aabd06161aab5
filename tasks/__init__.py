"""Every task by its name in the configuration."""

from sage.interfaces import Task
from tasks.cifar import Cifar10, Cifar100
from tasks.digits import Digits
from tasks.ptb import PennTreebank
from tasks.python_docs import PythonDocs
from tasks.wikitext2 import WikiText2

TASKS: dict[str, type[Task]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "digits": Digits,
    "ptb": PennTreebank,
    "python_docs": PythonDocs,
    "wikitext2": WikiText2,
}

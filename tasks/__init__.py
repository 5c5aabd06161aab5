"""Every task by its name in the configuration; its module is imported when the task is looked up, and so is
torch."""

from typing import TYPE_CHECKING

from sage.components import ComponentTable

if TYPE_CHECKING:
    from sage.interfaces import Task

TASKS: "ComponentTable[Task]" = ComponentTable(
    "sage.interfaces:Task",
    {
        "cifar10": "tasks.cifar:Cifar10",
        "cifar100": "tasks.cifar:Cifar100",
        "digits": "tasks.digits:Digits",
        "ml-100k": "tasks.movielens:MovieLens100K",
        "ml-1m": "tasks.movielens:MovieLens1M",
        "ml-20m": "tasks.movielens:MovieLens20M",
        "ptb": "tasks.ptb:PennTreebank",
        "python_docs": "tasks.python_docs:PythonDocs",
        "synthetic_ratings": "tasks.synthetic_ratings:SyntheticRatings",
        "wikitext2": "tasks.wikitext2:WikiText2",
    },
)

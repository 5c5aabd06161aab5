"""Every task by its name in the configuration."""

from sage.interfaces import Task
from tasks.cifar10 import Cifar10
from tasks.digits import Digits

TASKS: dict[str, type[Task]] = {
    "cifar10": Cifar10,
    "digits": Digits,
}

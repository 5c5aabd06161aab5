"""The tests run torch as the program does: threads that wait for one another sleep."""

from sage.workers import environment

environment.set_defaults()

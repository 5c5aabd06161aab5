"""The engine of SAGE. It imports neither reducers nor tasks."""

__version__ = "0.1.0"

"""The engine of SAGE. It imports neither reducers nor tasks."""

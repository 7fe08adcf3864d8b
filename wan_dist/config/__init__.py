"""Schemas, their registration with Hydra, and the frozen file that a run hands to its ranks. Imports no torch."""

"""Pure functions over values: what a null means, which mesh, what cannot run and why. Imports no torch."""

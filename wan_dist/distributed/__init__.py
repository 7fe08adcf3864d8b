"""The process group, the mesh, and the collectives. A group is always an argument, never a global."""

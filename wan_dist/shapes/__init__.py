"""The small model `wan_shapes`: what it knows, how it was trained, whether a video shows what was asked for."""

"""Layerwise streaming: the blocks of a model live in host memory and visit the device when their turn comes."""

"""Building blocks that know tensors and axes, but no model's module names."""

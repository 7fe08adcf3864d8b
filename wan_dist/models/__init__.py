"""diffusers' models, taught to be parallel from the outside: the only place that knows their module names."""

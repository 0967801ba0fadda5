"""Ways to compute a Jacobian, one per file, found by `autojac.methods.base.registry`."""

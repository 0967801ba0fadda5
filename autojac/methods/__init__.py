"""Ways to compute a Jacobian or single derivatives, one per file, found by `autojac.methods.base.registry`."""

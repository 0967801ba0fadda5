"""Jacobian methods, one a file, found by `autojac.methods.base.registry`."""

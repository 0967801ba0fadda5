"""Jacobians by JAX, asdex and TensorFlow, in processes and environments of their own, raced in turns."""

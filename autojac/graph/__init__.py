"""A call as a graph of aten operators."""

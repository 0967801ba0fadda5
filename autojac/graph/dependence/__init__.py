"""Which inputs stand behind each element of a tensor, followed through a graph operator by operator.

The inputs may be the coordinates of a sample, the samples, or both. Each element has the set of those that it depends
on. The sets are the rows of one boolean matrix, and an element holds the number of its row: what only moves elements
about (views, slices, rolls, gathers) is run on these numbers by the very same operator, so it needs no rule. Axes on
which all elements are alike have length 1. Along an axis that an operator mixes, or that nothing is known of, all sets
are united, which is never wrong, and dense in the worst case. The idea of sets that run along with the values is that
of SparseConnectivityTracer.jl (Hill and Dalle, 2025).
"""

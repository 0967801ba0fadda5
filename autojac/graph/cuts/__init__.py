"""Where a graph is cut, so that Jacobians of its parts are multiplied."""

"""From a call to a prepared plan."""

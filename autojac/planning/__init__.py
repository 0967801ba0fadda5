"""From a call to a prepared plan: found in the store, estimated, or searched before or while it is used (`search/`)."""

"""Which samples each sample reads, operator by operator."""

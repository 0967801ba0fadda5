"""Where the batch axis goes, operator by operator."""

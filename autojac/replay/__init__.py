"""A method recorded once and run as a flat program."""

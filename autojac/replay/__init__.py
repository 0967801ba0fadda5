"""A method recorded once, simplified pass by pass, and run as a flat program."""

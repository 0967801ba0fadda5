"""The vocabulary of the other rooms, and how func is run without side effects."""

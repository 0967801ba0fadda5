"""Functions and models of other libraries: whether autojac is right on them, serves them by a replay, and is quick."""

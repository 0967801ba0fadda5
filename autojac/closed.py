"""STUB until merged."""


class Watched:
    def __init__(self, codes):
        self.reason = ""

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

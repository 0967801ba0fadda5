"""What a method gets and gives: the problem, layouts, compression, and reference values."""

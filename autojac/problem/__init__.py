"""What a method gets and gives: the problem, layouts, compression, reference values, and the machine's constants."""

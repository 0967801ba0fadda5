"""The cases, by what they are about; each file adds its own."""

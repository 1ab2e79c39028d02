"""The commands that do not train, by topic. Imports no torch."""

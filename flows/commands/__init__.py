"""The verbs of the command line, grouped by what people come for."""

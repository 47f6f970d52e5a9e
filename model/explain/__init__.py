"""Explanations of a trained classifier: rules in concepts, and maps over pixels."""

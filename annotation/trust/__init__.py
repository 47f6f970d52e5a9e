"""How good each label is: thresholds, fusion of witnesses, agreement, leaks and the expert audit."""

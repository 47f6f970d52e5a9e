"""The review page: look at labels, correct them, and answer the audit, in a browser on this machine."""

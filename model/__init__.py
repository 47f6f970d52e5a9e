"""Aligned data set in, trained and explained classifier out.

METHOD, section 3, is `concept_encoder`, `logic`, `network` and `losses`, in this order. `data` feeds them,
`fit` trains, `evaluate` measures, `checkpoint` keeps, `predict` uses, `explain` explains.
"""

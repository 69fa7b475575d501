"""Labels from people: which regions of plain images to label next, and a ledger that keeps every answer exactly once.

Its modules are imported one by one, so that the ledger needs neither torch nor Ray.
"""

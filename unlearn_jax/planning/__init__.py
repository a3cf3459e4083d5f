"""The plan of an edit: what it takes on accelerators that need not be there."""

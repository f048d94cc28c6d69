"""Work over several ranks: one file for each way to divide it. So far only the mesh stands (`mesh`)."""

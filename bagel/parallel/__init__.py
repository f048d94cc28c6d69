"""Work over several ranks: the mesh, its groups, and one file for each way to divide the work."""

"""What a packed checkpoint stores: layers, grids, rotations, files."""

"""The MLPs of blocks whose linears the block's own code calls: their forms, how they are found, and how they change."""

"""What tests share: oracles, the table of transformations, runs of several kinds."""
